// A text token by token. Pointing at one, or going there with the arrow keys, tells its probability and the others'.
export default {
  template: `
    <div>
      <div class="tokens" :tabindex="odds ? 0 : -1" role="group" :aria-label="label"
           @keydown.left.prevent="go(-1)" @keydown.right.prevent="go(1)" @keydown.home.prevent="at = 0"
           @mouseover="point" @mouseleave="at = null"><span v-for="(token, index) in tokens" :key="index" :data-index="index"
           :class="{here: index === at, unsure: token.p < 0.5}" :style="{'--doubt': 100 * (1 - (token.p ?? 1)) + '%'}">{{ token.t }}</span></div>
      <div class="odds" v-if="odds" aria-live="polite"><template v-if="at !== null && tokens[at]"><b>{{ show(tokens[at].t) }}</b>
        {{ percent(tokens[at].p) }}<template v-if="tokens[at].top.length"> — instead:
        <template v-for="(other, index) in tokens[at].top" :key="index"><template v-if="index">, </template>{{ show(other[0]) }} {{ percent(other[1]) }}</template></template></template>
        <template v-else-if="tokens.length">Point at a token, or use the arrow keys, to see how likely it was.</template></div>
    </div>`,
  props: ["label", "odds"],
  data: () => ({ tokens: [], at: null }),
  methods: {
    append(more) { this.tokens.push(...more); },
    clear() { this.tokens = []; this.at = null; },
    point(event) {
      const index = event.target.dataset.index;
      if (this.odds && index !== undefined) this.at = Number(index);
    },
    go(step) {
      const last = this.tokens.length - 1;
      this.at = this.at === null ? 0 : Math.min(last, Math.max(0, this.at + step));
    },
    show(text) { return JSON.stringify(text); },
    percent(p) { return p >= 0.1 ? (100 * p).toFixed(0) + " %" : (100 * p).toPrecision(2) + " %"; },
  },
};
