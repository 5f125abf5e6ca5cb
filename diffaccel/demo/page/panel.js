// What came of a request: players in sync, figures and sentences. Everything from outside goes in as text.
const part = (name) => element.querySelector('[data-da="' + name + '"]');
const canvas = part('canvas'), context = canvas.getContext('2d');
let shown = null, playing = !matchMedia('(prefers-reduced-motion: reduce)').matches, at = 0, beside = false, before = 0, followed = true;
let pictures = new Map();

const make = (tag, text, name) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
};
const show = (name, on) => { part(name).hidden = !on; };
const say = (name, text) => { if (part(name).textContent !== text) part(name).textContent = text; };
const count = (clip) => clip.parts.reduce((a, b) => a + b, 0);
const length = () => shown && shown.clips ? Math.max(0, ...shown.clips.map(count)) : 0;
const address = (clip, rest) => 'results/' + [shown.key, clip.name].map(encodeURIComponent).join('/') + rest;

// -- frames ---------------------------------------------------------------------------------------------------------

function fetchParts() {
  for (const clip of shown.clips) clip.parts.forEach((_, number) => {
    const url = address(clip, '/' + number + '.jpg');
    if (pictures.has(url)) return;
    const picture = new Image();
    pictures.set(url, picture);
    picture.onload = draw;
    picture.src = url;
  });
}

function frameOf(clip, frame) { // the picture that holds it, and the row where it begins
  for (let number = 0; number < clip.parts.length; number++) {
    if (frame < clip.parts[number]) {
      const picture = pictures.get(address(clip, '/' + number + '.jpg'));
      return picture && picture.complete && picture.naturalWidth ? [picture, frame * clip.size[1]] : null;
    }
    frame -= clip.parts[number];
  }
  return null;
}

function put(clip, from, to, shift) { // columns [from, to) of the frame, in [0, 1], moved by so many frames
  const [width, height] = clip.size, across = canvas.width / (two() && beside ? 2 : 1);
  const found = frameOf(clip, at);
  const x = Math.round(from * across), wide = Math.round(to * across) - x;
  if (wide <= 0) return;
  if (!found) {
    context.fillStyle = '#667';
    context.fillRect(shift * across + x, 0, wide, canvas.height);
    return;
  }
  const scale = width / across;
  context.drawImage(found[0], x * scale, found[1], wide * scale, height, shift * across + x, 0, wide, canvas.height);
}

const two = () => shown.clips.length === 2;

function draw() {
  if (!shown || !shown.clips || !shown.clips.length) return;
  const [left, right] = shown.clips, [width, height] = left.size;
  const scale = Math.max(1, Math.ceil(384 / width)), wide = width * scale * (two() && beside ? 2 : 1);
  if (canvas.width !== wide || canvas.height !== height * scale) { canvas.width = wide; canvas.height = height * scale; }
  const aspect = canvas.width / canvas.height; // no higher than the window, and as wide as its height allows
  part('player').style.setProperty('--wide', 'min(' + (two() && beside ? 960 : 640) + 'px, ' + 70 * aspect + 'vh)');
  context.imageSmoothingEnabled = false;
  if (!two()) put(left, 0, 1, 0);
  else if (beside) { put(left, 0, 1, 0); put(right, 0, 1, 1); }
  else {
    const share = part('wipe').value / 100, x = Math.round(share * canvas.width);
    put(left, 0, share, 0);
    put(right, share, 1, 0);
    context.fillStyle = '#fff';
    context.fillRect(x - 1, 0, 2, canvas.height);
    context.fillStyle = '#000';
    context.fillRect(x + 1, 0, 1, canvas.height);
  }
  canvas.dataset.frame = at;
  part('seek').max = Math.max(0, length() - 1);
  part('seek').value = at;
  say('frame', (at + 1) + '/' + length());
}

function tick(now) {
  if (!element.isConnected) return;
  requestAnimationFrame(tick);
  const all = length(), wait = 1000 / (shown && shown.fps || 16);
  if (!playing || !all || now - before < wait - 4) return;
  before = now;
  at = (at + 1) % all;
  if (canvas.offsetParent) draw();
}
requestAnimationFrame(tick);

// -- controls ---------------------------------------------------------------------------------------------------------

const pause = (on) => { playing = !on; say('play', on ? 'Play' : 'Pause'); };
pause(!playing);
part('play').addEventListener('click', () => pause(playing));
part('seek').addEventListener('input', () => { pause(true); at = Number(part('seek').value); draw(); });
part('wipe').addEventListener('input', draw);
part('view').addEventListener('click', () => {
  beside = !beside;
  say('view', beside ? 'Wipe' : 'Side by side');
  show('wiping', two() && !beside);
  draw();
});
const drag = (event) => {
  if (!event.buttons || !two() || beside) return;
  const box = canvas.getBoundingClientRect();
  part('wipe').value = 100 * (event.clientX - box.left) / box.width;
  draw();
};
canvas.addEventListener('pointerdown', drag);
canvas.addEventListener('pointermove', drag);

// -- figures and sentences ----------------------------------------------------------------------------------------------

function table(name, head, rows) {
  const made = part(name);
  made.hidden = !rows.length;
  const line = (cells, tag) => {
    const row = make('tr');
    cells.forEach((cell, number) => row.append(make(number ? tag : 'th', cell)));
    return row;
  };
  made.replaceChildren(line(head, 'th'), ...rows.map((cells) => line(cells, 'td')));
}

function sentences(name, tag, found) {
  part(name).hidden = !found.length;
  part(name).replaceChildren(...found.map((sentence) => make(tag, sentence)));
}

function files() {
  const links = shown.clips.filter((clip) => clip.file).map((clip) => [clip.label + ' (MP4)', address(clip, '.mp4')]);
  if (shown.report) links.push(['Report (JSON)', 'results/' + encodeURIComponent(shown.key) + '/report.json']);
  part('files').replaceChildren(...links.map(([label, url]) => {
    const link = make('a', label);
    link.href = url;
    link.download = '';
    return link;
  }));
}

function update() {
  const next = props.value || {};
  if (!next.state) return;
  if (!shown || shown.key !== next.key) {
    pictures = new Map();
    at = 0;
    if (next.settings) history.replaceState(null, '', '?settings=' + encodeURIComponent(next.settings));
    followed = false;
  }
  shown = { clips: [], texts: [], notes: [], warnings: [], techniques: [], figures: { columns: [], rows: [] }, ...next };
  element.dataset.state = shown.state;
  say('headline', shown.headline);
  say('status', { waiting: 'Waiting', running: 'Working', done: 'Done', cancelled: 'Cancelled', failed: 'Not made' }[shown.state]);
  show('progress', shown.total > 0);
  part('progress').max = shown.total || 1;
  part('progress').value = shown.done || 0;
  show('error', Boolean(shown.error));
  say('error', shown.error || '');
  sentences('warnings', 'p', shown.warnings);
  show('verdict', Boolean(shown.verdict));
  say('verdict', shown.verdict || '');
  show('player', shown.clips.length > 0);
  if (shown.clips.length) {
    at = Math.min(at, length() - 1);
    say('left', shown.clips[0].label);
    say('right', two() ? shown.clips[1].label : '');
    show('wiping', two() && !beside);
    show('view', two());
    fetchParts();
    draw();
  }
  part('texts').replaceChildren(...shown.texts.flatMap((one) => [make('h4', one.label), make('pre', one.text)]));
  table('figures', ['measured', ...shown.figures.columns], shown.figures.rows);
  table('techniques', ['slot', 'technique', 'engaged', 'skipped', 'keys read'], shown.techniques);
  sentences('notes', 'li', shown.notes);
  files();
  if (!followed && (shown.error || shown.clips.length || shown.texts.length)) {
    followed = true; // once: from then on the reader decides where to look
    const top = element.getBoundingClientRect().top;
    if (top < 0 || top > innerHeight / 2) element.scrollIntoView();
  }
}
watch('value', update);
update();
