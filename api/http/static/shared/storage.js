// Storage of the pages: per tab or per browser; in memory only if neither is available.

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
    // Disabled by the browser's settings: the shop works, but forgets at a reload.
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
