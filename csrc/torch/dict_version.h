// Tells whether a dict has changed, without looking at its items.
//
//   version_of(dict)              stands for what the dict holds now; 0: changes can't be noticed
//   is_of_version(dict, version)  whether the dict is certain to be unchanged since then
//   prefetch_version(dict)        fetches what is_of_version() will read
#pragma once

#include <Python.h>

#include <cstdint>

namespace fusedopt {

#if PY_VERSION_HEX < 0x030C0000

// Python gives a dict a new number whenever it changes.
inline uint64_t version_of(PyObject* dict) {
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
}

inline bool is_of_version(PyObject* dict, uint64_t version) {
  return version != 0 && version_of(dict) == version;
}

inline void prefetch_version(PyObject* dict) { __builtin_prefetch(dict); }

#else

// Grows whenever a dict changes that version_of() has seen. The GIL guards it.
inline uint64_t dict_changes = 1;

// Python lends a few watchers of dicts; -1: other code has them all.
inline int dict_watcher() {
  static const int id = [] {
    const int added = PyDict_AddWatcher([](PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
      ++dict_changes;
      return 0;
    });
    if (added < 0) PyErr_Clear();
    return added;
  }();
  return id;
}

inline uint64_t version_of(PyObject* dict) {
  if (dict_watcher() < 0) return 0;
  if (PyDict_Watch(dict_watcher(), dict) == 0) return dict_changes;
  PyErr_Clear();
  return 0;
}

// It doesn't read the dict. After a change of any dict, all of them are looked through once.
inline bool is_of_version(PyObject*, uint64_t version) { return version == dict_changes; }

inline void prefetch_version(PyObject*) {}

#endif

}  // namespace fusedopt
