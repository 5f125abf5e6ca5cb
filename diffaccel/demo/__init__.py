"""A page in the browser to try models, presets and knobs with: what `diffaccel demo` serves.

A request is data (`asked`), checked against limits before it waits for its model (`worker`). One thread works for each
model, because a pipeline has one cache. It makes clips (`clips`) and says what was measured (`shown`); the page
(`layout`, `page/`) shows that while it grows. Texts are put into the page as text alone, never as markup.
"""
