/* The module: its types, its functions and the constants of the layout. */

#include "common.h"

#include <pthread.h>

/* layout(max_completed, max_operations, feed_bytes, max_participants) -> where the parts lie, by name */
static PyObject *
native_layout(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Capacities room;
    Shape shape;
    if (!check_arity("layout", nargs, 4) || !as_u64(args[0], &room.max_completed)
        || !as_u64(args[1], &room.max_operations) || !as_u64(args[2], &room.feed_bytes)
        || !as_u64(args[3], &room.max_participants)) {
        return NULL;
    }
    if (!shape_of(&room, &shape)) {
        PyErr_SetString(PyExc_ValueError, "no segment has these capacities");
        return NULL;
    }
    return Py_BuildValue(
        "{sK sK sK sK sK sK sK sK sK sK}", "participants", (unsigned long long)shape.participants,
        "fingerprints", (unsigned long long)shape.fingerprints, "retained",
        (unsigned long long)shape.retained, "retained_count",
        (unsigned long long)shape.retained_count, "index", (unsigned long long)shape.index,
        "index_count", (unsigned long long)shape.index_count, "slots",
        (unsigned long long)shape.slots, "slot_size", (unsigned long long)shape.slot_size,
        "records", (unsigned long long)shape.records, "size", (unsigned long long)shape.size);
}

PyMethodDef layout_functions[] = {
    {"layout", (PyCFunction)(void (*)(void))native_layout, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static const struct {
    const char *name;
    uint64_t value;
} constants[] = {
#define CONSTANT(name, value) {name, (uint64_t)(value)},
    LAYOUT_CONSTANTS(CONSTANT)
#undef CONSTANT
};

static PyTypeObject *
make_type(PyObject *module, PyType_Spec *spec)
{
    return (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
}

static int
module_exec(PyObject *module)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    ModuleState *state = PyModule_GetState(module);
    const struct {
        PyTypeObject **type;
        PyType_Spec *spec;
    } kept[] = {
        {&state->memory_type, &memory_spec},         {&state->descriptor_type, &descriptor_spec},
        {&state->writer_type, &writer_spec},         {&state->snapshots_type, &snapshots_spec},
        {&state->identifier_type, &identifier_spec}, {&state->epoch_type, &epoch_spec},
    };
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        *kept[i].type = make_type(module, kept[i].spec);
        /* Snapshots are made by a method of Memory only, so the module does not name them. */
        if (*kept[i].type == NULL
            || (kept[i].spec != &snapshots_spec && PyModule_AddType(module, *kept[i].type) < 0)) {
            return -1;
        }
    }
    PyTypeObject *cell = make_type(module, &cell_spec);
    if (cell == NULL || PyModule_AddType(module, cell) < 0) {
        Py_XDECREF((PyObject *)cell);
        return -1;
    }
    Py_DECREF((PyObject *)cell);
    state->refused = PyErr_NewExceptionWithDoc(
        "shmepoch._native.Refused",
        "A transition or a read was refused: (reason, field, index, least, most, actual).", NULL,
        NULL);
    if (state->refused == NULL || PyModule_AddObjectRef(module, "Refused", state->refused) < 0) {
        return -1;
    }
    PyMethodDef *const functions[] = {lock_functions, descriptor_functions, identifier_functions,
                                      layout_functions};
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        if (PyModule_AddFunctions(module, functions[i]) < 0) {
            return -1;
        }
    }
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(constants[i].value);
        if (value == NULL || PyModule_AddObjectRef(module, constants[i].name, value) < 0) {
            Py_XDECREF(value);
            return -1;
        }
        Py_DECREF(value);
    }
    PyObject *magic = PyLong_FromUnsignedLongLong(MAGIC);
    const int added = magic == NULL ? -1 : PyModule_AddObjectRef(module, "MAGIC", magic);
    Py_XDECREF(magic);
    return added;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    ModuleState *state = PyModule_GetState(module);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->descriptor_type);
    Py_VISIT(state->writer_type);
    Py_VISIT(state->snapshots_type);
    Py_VISIT(state->identifier_type);
    Py_VISIT(state->epoch_type);
    Py_VISIT(state->refused);
    return 0;
}

static int
module_clear(PyObject *module)
{
    ModuleState *state = PyModule_GetState(module);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->descriptor_type);
    Py_CLEAR(state->writer_type);
    Py_CLEAR(state->snapshots_type);
    Py_CLEAR(state->identifier_type);
    Py_CLEAR(state->epoch_type);
    Py_CLEAR(state->refused);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmepoch._native",
    .m_doc = "The memory of an epoch: atomics, locks, waits and each transition, once.",
    .m_size = sizeof(ModuleState),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&module_definition);
}
