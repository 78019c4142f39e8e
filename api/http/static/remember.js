// What the pages remember: in this tab, or in this browser; until they are closed where neither may be used.

class Memory {
  #kept = new Map();
  getItem(name) {
    return this.#kept.get(name) ?? null;
  }
  setItem(name, value) {
    this.#kept.set(name, value);
  }
  removeItem(name) {
    this.#kept.delete(name);
  }
}

function open(which) {
  try {
    const storage = window[which];
    storage.setItem("reservation.probe", "");
    storage.removeItem("reservation.probe");
    return storage;
  } catch {
    // Switched off by the browser's settings: the shop works on, but for a reload.
    return new Memory();
  }
}

function remembers(storage) {
  return {
    get(name) {
      return JSON.parse(storage.getItem(`reservation.${name}`));
    },
    set(name, value) {
      storage.setItem(`reservation.${name}`, JSON.stringify(value));
    },
    forget(name) {
      storage.removeItem(`reservation.${name}`);
    },
  };
}

export const browser = remembers(open("localStorage"));
export const tab = remembers(open("sessionStorage"));
