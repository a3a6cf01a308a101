// The choice of colours. It lives in the browser (see page.js); the server need not know.
export default {
  template: `
    <div class="field">
      <label for="theme">Colours</label>
      <select id="theme" class="entry" v-model="theme" @change="apply">
        <option value="">as the system</option><option value="light">light</option><option value="dark">dark</option>
      </select>
    </div>`,
  data: () => ({ theme: document.documentElement.dataset.theme || "" }),
  mounted() { if (this.theme) setDark(this.theme === "dark"); },
  methods: { apply() { chooseTheme(this.theme); } },
};
