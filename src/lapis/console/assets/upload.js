// Sends a file to the server as it is read, and tells how far it came.
export default {
  template: `
    <form class="form" @submit.prevent="send">
      <div class="field"><label for="upload-file">File</label><input id="upload-file" class="entry" type="file" ref="file" required></div>
      <div class="field"><label for="upload-purpose">Purpose</label>
        <select id="upload-purpose" class="entry" v-model="purpose">
          <option v-for="(label, value) in purposes" :key="value" :value="value">{{ label }}</option>
        </select></div>
      <div class="field"><label for="upload-days">Delete after days</label>
        <input id="upload-days" class="entry" type="number" min="1" max="30" v-model="days" placeholder="never"></div>
      <button class="button main" :disabled="share !== null">{{ share === null ? "Upload" : Math.floor(100 * share) + " %" }}</button>
    </form>`,
  props: ["url", "csrf", "purposes"],
  emits: ["sent", "failed"],
  data() { return { purpose: Object.keys(this.purposes)[0], days: "", share: null }; },
  methods: {
    send() {
      const form = new FormData();
      form.append("purpose", this.purpose);
      if (this.days) {
        form.append("expires_after[anchor]", "created_at");
        form.append("expires_after[seconds]", String(86400 * Number(this.days)));
      }
      form.append("file", this.$refs.file.files[0]);
      const request = new XMLHttpRequest();
      request.open("POST", this.url);
      request.setRequestHeader("x-csrf-token", this.csrf);
      request.responseType = "json";
      request.upload.onprogress = (event) => { this.share = event.loaded / event.total; };
      request.onloadend = () => {
        this.share = null;
        if (request.status === 200) {
          this.$refs.file.value = "";
          this.$emit("sent", request.response);
        } else this.$emit("failed", request.response?.message || "The server did not take the file: status " + request.status + ".");
      };
      this.share = 0;
      request.send(form);
    },
  },
};
