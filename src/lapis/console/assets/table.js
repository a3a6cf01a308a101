// A table of plain rows: real table markup, sorted at a click, one button for each act on a row.
export default {
  template: `
    <section class="data" :aria-label="title">
      <div class="title" v-if="title"><h2>{{ title }}</h2><slot name="beside"></slot></div>
      <div class="scroll" v-if="rows.length" tabindex="-1">
        <table role="table">
          <caption class="hidden-text">{{ title }}</caption>
          <thead role="rowgroup"><tr role="row">
            <th v-if="choosing" scope="col" role="columnheader"><span class="hidden-text">{{ choosing }}</span></th>
            <th v-for="column in columns" :key="column.field" scope="col" role="columnheader"
                :class="column.kind" :aria-sort="order(column)">
              <button type="button" class="sort" :data-mark="mark(column)" @click="turn(column)">{{ column.title }}</button>
            </th>
            <th v-if="acting" scope="col" role="columnheader"><span class="hidden-text">Actions</span></th>
          </tr></thead>
          <tbody role="rowgroup">
            <tr v-for="row in sorted" :key="row.key" role="row">
              <td v-if="choosing" role="cell" :data-label="choosing">
                <input type="checkbox" :aria-label="choosing + ' ' + row.key" :checked="chosen.includes(row.key)"
                       @change="choose(row.key, $event.target.checked)">
              </td>
              <td v-for="column in columns" :key="column.field" role="cell" :data-label="column.title"
                    :class="[column.kind, {blank: blank(row.cells[column.field])}]">
                <cell :value="row.cells[column.field]"></cell>
              </td>
              <td v-if="acting" role="cell" class="acts">
                <button v-for="act in row.acts" :key="act.name" type="button" class="act" :class="{danger: act.danger}"
                        :aria-label="act.label + ' ' + row.key" @click="$emit('act', {act: act.name, key: row.key})">{{ act.label }}</button>
              </td>
            </tr>
          </tbody>
        </table>
      </div>
      <p class="empty" v-else>{{ empty }} <code v-if="command">{{ command }}</code></p>
    </section>`,
  components: {
    cell: {
      props: ["value"],
      template: `
        <a v-if="value.href" :href="value.href" :title="value.hint">{{ value.text }}</a>
        <span v-else-if="value.tone" class="tone" :class="value.tone" :title="value.hint">{{ value.text }}</span>
        <span v-else :title="value.hint">{{ value.text }}</span>
        <span v-if="value.links" class="several"><a v-for="link in value.links" :key="link[1]" :href="link[1]">{{ link[0] }}</a></span>
        <span v-if="value.share !== undefined" class="track" aria-hidden="true"><span class="bar" :style="{width: 100 * value.share + '%'}"></span></span>`,
    },
  },
  props: ["title", "columns", "rows", "empty", "command", "choosing"],
  emits: ["act", "choose"],
  data: () => ({ by: null, down: false, chosen: [] }),
  computed: {
    acting() { return this.rows.some((row) => row.acts && row.acts.length); },
    sorted() {
      if (this.by === null) return this.rows;
      const value = (row) => row.cells[this.by].value ?? row.cells[this.by].text;
      const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      const rows = [...this.rows].sort((a, b) => compare(value(a), value(b)));
      return this.down ? rows.reverse() : rows;
    },
  },
  methods: {
    blank(value) { return value.text === "" && value.share === undefined && !value.links; },
    order(column) { return this.by === column.field ? (this.down ? "descending" : "ascending") : "none"; },
    mark(column) { return this.by === column.field ? (this.down ? " ↓" : " ↑") : ""; },
    turn(column) {
      this.down = this.by === column.field ? !this.down : column.kind === "number" || column.kind === "time";
      this.by = column.field;
    },
    choose(key, on) {
      this.chosen = on ? [...this.chosen, key] : this.chosen.filter((other) => other !== key);
      this.$emit("choose", this.chosen);
    },
  },
};
