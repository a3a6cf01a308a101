// A native form field with its label. It keeps what is being typed; the server hears of every change.
let count = 0;
export default {
  template: `
    <div class="field" :class="{check: kind === 'checkbox'}">
      <label :for="id" :class="{'hidden-text': silent}">{{ label }}</label>
      <select v-if="kind === 'select'" :id="id" class="entry" v-model="text" @change="$emit('change', text)" :disabled="disabled">
        <option v-for="option in options" :key="option.value" :value="option.value">{{ option.label }}</option>
      </select>
      <textarea v-else-if="kind === 'area'" :id="id" class="entry" v-model="text" :rows="rows || 3" :placeholder="placeholder"
                :disabled="disabled" @input="$emit('change', text)" @keydown.enter="enter"></textarea>
      <input v-else-if="kind === 'checkbox'" :id="id" type="checkbox" class="entry" v-model="text" :disabled="disabled"
             @change="$emit('change', text)">
      <input v-else :id="id" class="entry" :type="kind" v-model="text" :min="min" :max="max" :step="step" :placeholder="placeholder"
             :disabled="disabled" :autocomplete="autocomplete || 'off'" :aria-describedby="hint ? id + '-hint' : null"
             @input="$emit('change', text)" @keydown.enter="$emit('enter')">
      <span v-if="hint" :id="id + '-hint'" class="hint">{{ hint }}</span>
    </div>`,
  props: ["label", "kind", "value", "options", "hint", "min", "max", "step", "placeholder", "rows", "silent", "disabled", "autocomplete", "turn"],
  emits: ["change", "enter"],
  data() { return { text: this.value, id: `field-${++count}` }; },
  watch: { value(now) { this.text = now; }, turn() { this.text = this.value; } },
  methods: {
    enter(event) {
      if (event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.$emit("enter");
    },
  },
};
