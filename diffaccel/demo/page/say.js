// A sentence, and a link to settings.
const line = element.querySelector('p'), link = element.querySelector('a');
function update() {
  const value = props.value || {};
  line.textContent = value.text || '';
  line.className = value.bad ? 'da-error' : '';
  line.hidden = !value.text;
  link.hidden = !value.settings;
  link.href = location.pathname + '?settings=' + encodeURIComponent(value.settings || '');
}
watch('value', update);
update();
