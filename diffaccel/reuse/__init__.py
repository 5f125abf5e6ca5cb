"""Is attention to everything outside the block needed again at this step?"""
