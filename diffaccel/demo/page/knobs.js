// Techniques and their knobs as native fields, of which only those of the chosen ones exist. Their texts are one value.
const filled = new Map(); // what was typed for a technique, also while another is chosen
let value = null;

const make = (tag, text, name) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
};
const tell = () => { props.value = structuredClone(value); };
const usual = (technique) => Object.fromEntries(technique.knobs.map((knob) => [knob.name, knob.default]));

function labelled(name, about, field) {
  const made = make('label', undefined, 'da-knob');
  made.append(make('span', name), make('small', about), field);
  return made;
}

function select(choices, chosen, changed) {
  const made = make('select');
  for (const choice of choices) made.append(new Option(choice, choice, false, choice === chosen));
  made.addEventListener('change', () => changed(made.value));
  return made;
}

function field(knob, texts) {
  if (knob.choices) return select(knob.choices, texts[knob.name], (text) => { texts[knob.name] = text; tell(); });
  const made = make('input');
  made.type = 'text';
  made.placeholder = knob.type;
  made.value = texts[knob.name];
  made.addEventListener('input', () => { texts[knob.name] = made.value; tell(); });
  return made;
}

function chosen(slot) { // what stands below the choice
  const technique = slot.techniques.find((one) => one.name === value.methods[slot.name]);
  if (!technique) return [];
  if (!filled.has(technique.name)) filled.set(technique.name, usual(technique));
  const texts = value.knobs[slot.name] = filled.get(technique.name);
  const about = make('p', technique.about);
  if (!technique.knobs.length) return [about];
  const knobs = make('details');
  knobs.append(make('summary', 'Knobs of ' + technique.name));
  for (const knob of technique.knobs) knobs.append(labelled(knob.name, knob.help, field(knob, texts)));
  return [about, knobs];
}

function group(slot) {
  const made = make('div', undefined, 'da-slot'), below = make('div');
  const names = ['none', ...slot.techniques.map((one) => one.name)];
  const choice = select(names, value.methods[slot.name], (name) => {
    value.methods[slot.name] = name;
    delete value.knobs[slot.name];
    below.replaceChildren(...chosen(slot));
    tell();
  });
  below.append(...chosen(slot));
  made.append(labelled(slot.name, slot.question, choice), below);
  return made;
}

function update() {
  if (!props.value || !props.value.methods) return;
  value = structuredClone(props.value);
  filled.clear();
  for (const [slot, texts] of Object.entries(value.knobs)) filled.set(value.methods[slot], texts);
  const kernel = select(catalog.kernels, value.kernel, (name) => { value.kernel = name; tell(); });
  element.querySelector('.da-knobs').replaceChildren(
    ...catalog.slots.map(group), labelled('kernel', 'auto takes the fastest that can run', kernel));
}
watch('value', update);
update();
