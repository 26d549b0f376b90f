// Opened from a folder, a page may start no worker, which the search is: a frame does its work.
if (location.protocol === "file:") {
  const hand = (message, receiver) => {
    const data = structuredClone(message); // as a worker gets it: its own, and later
    setTimeout(() => receiver?.onmessage?.({ data }));
  };
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => {
        this.frame.onload = () => {
          const inside = this.frame.contentDocument;
          const script = inside.createElement("script");
          script.src = url;
          script.onload = resolve;
          script.onerror = (event) => this.onerror?.(event);
          inside.defaultView.postMessage = (message) => hand(message, this);
          inside.body.append(script);
        };
      });
      document.body.append(this.frame);
    }
    postMessage(message) {
      this.ready.then(() => hand(message, this.frame.contentWindow));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
