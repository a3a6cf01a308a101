// Runs before the page is drawn: a chosen theme comes from its cookie; without one the system's is followed.
// Also here: what a page does besides drawing, copying a text and noticing that its session has ended.
(() => {
  const name = "lapis_theme";
  const chosen = () => (document.cookie.match(/(?:^|; )lapis_theme=(light|dark)/) || [])[1];
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  };
  apply(chosen());
  window.chooseTheme = (theme) => {
    const age = theme ? 31536000 : 0;
    document.cookie = `${name}=${theme}; path=/console; max-age=${age}; samesite=strict`;
    apply(theme);
    setDark(theme ? theme === "dark" : null);
  };
  window.copyText = async (text, button) => {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select it and press Ctrl+C";
    }
    setTimeout(() => { button.textContent = before; }, 1500);
  };
  // A page whose session has ended asks for a key again, instead of trying to reconnect for ever.
  const look = async () => {
    const answer = await fetch(location.href).catch(() => null);
    if (answer?.status === 401) location.reload();
  };
  const wait = setInterval(() => {
    if (!window.socket) return;
    clearInterval(wait);
    window.socket.on("disconnect", look);
    window.socket.on("connect_error", look);
  }, 200);
})();
