// Storage of the pages: per tab or per browser; in memory if the browser allows neither.

class MemoryStorage {
  #values = new Map();
  getItem(name) {
    return this.#values.get(name) ?? null;
  }
  setItem(name, value) {
    this.#values.set(name, value);
  }
  removeItem(name) {
    this.#values.delete(name);
  }
}

function open(kind) {
  try {
    const storage = window[kind];
    storage.setItem("reservation.probe", "");
    storage.removeItem("reservation.probe");
    return storage;
  } catch {
    // Disabled by the browser's settings: the shop works, but forgets at a reload.
    return new MemoryStorage();
  }
}

/** Values as JSON, under the prefix of the service. */
function jsonIn(storage) {
  return {
    /** The value of this name, or null. */
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

export const browser = jsonIn(open("localStorage"));
export const tab = jsonIn(open("sessionStorage"));
