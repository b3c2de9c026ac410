/* Identifier: sixteen bytes with a kind, compared, hashed and written natively.
 *
 * Each operation's id is compared, hashed, written and read a dozen times between its registration
 * and its completion; in Python that took an eighth of an operation's whole time.
 */

#include "common.h"

#define LENGTH 16

static PyObject *
refuse(PyObject *error, PyTypeObject *type, const char *why, PyObject *value)
{
    PyObject *name = PyObject_GetAttrString((PyObject *)type, "__name__");
    if (name != NULL) {
        PyErr_Format(error, "%U %s: %R", name, why, value);
        Py_DECREF(name);
    }
    return NULL;
}

static PyObject *
make(PyTypeObject *type, PyObject *raw)
{
    if (!PyBytes_Check(raw)) {
        return refuse(PyExc_TypeError, type, "takes bytes, not", raw);
    }
    if (PyBytes_Size(raw) != LENGTH) {
        char why[64];
        PyOS_snprintf(why, sizeof why, "takes 16 bytes, not %zd", PyBytes_Size(raw));
        return refuse(PyExc_ValueError, type, why, raw);
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Identifier *self = (Identifier *)allocate(type, 0);
    if (self != NULL) {
        /* Another kind of bytes may compare and hash in another way. */
        self->raw = PyBytes_CheckExact(raw)
                        ? Py_NewRef(raw)
                        : PyBytes_FromStringAndSize(PyBytes_AsString(raw), LENGTH);
        if (self->raw == NULL) {
            Py_CLEAR(self);
        }
    }
    return (PyObject *)self;
}

/* The same as a call of the type, without the tuple that a call makes of its argument. */
static PyObject *
identifier_from_bytes(PyObject *type, PyObject *raw)
{
    return make((PyTypeObject *)type, raw);
}

static PyObject *
identifier_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"", NULL};
    PyObject *raw;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", keywords, &raw)) {
        return NULL;
    }
    return make(type, raw);
}

static void
identifier_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_CLEAR(((Identifier *)object)->raw);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *
identifier_compare(PyObject *one, PyObject *other, int operation)
{
    /* An identifier of a session is never one of an operation, whatever its bytes. */
    if (Py_TYPE(one) != Py_TYPE(other)) {
        Py_RETURN_NOTIMPLEMENTED;
    }
    return PyObject_RichCompare(((Identifier *)one)->raw, ((Identifier *)other)->raw, operation);
}

static Py_hash_t
identifier_hash(PyObject *object)
{
    return PyObject_Hash(((Identifier *)object)->raw);
}

static PyObject *
identifier_bytes(PyObject *object, void *Py_UNUSED(closure))
{
    return Py_NewRef(((Identifier *)object)->raw);
}

/* Searches in shared memory compare fingerprints. Zero means that there is no id. */
static PyObject *
identifier_fingerprint(PyObject *object, void *Py_UNUSED(closure))
{
    uint64_t random_half;
    memcpy(&random_half, PyBytes_AsString(((Identifier *)object)->raw) + LENGTH - sizeof random_half,
           sizeof random_half);
    return PyLong_FromUnsignedLongLong(random_half != 0 ? random_half : 1);
}

static PyGetSetDef identifier_getters[] = {
    {"bytes", identifier_bytes, NULL, "The sixteen bytes of the UUID, most significant first.", NULL},
    {"fingerprint", identifier_fingerprint, NULL, "The random half of a UUID v7; never 0.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef identifier_methods[] = {
    {"from_bytes", identifier_from_bytes, METH_O | METH_CLASS,
     "The identifier whose UUID has these sixteen bytes; ValueError for another length."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot identifier_slots[] = {
    {Py_tp_doc, "Identifier(raw): sixteen bytes that equal only those of the same subclass."},
    {Py_tp_new, identifier_new},
    {Py_tp_dealloc, identifier_dealloc},
    {Py_tp_richcompare, identifier_compare},
    {Py_tp_hash, identifier_hash},
    {Py_tp_getset, identifier_getters},
    {Py_tp_methods, identifier_methods},
    {0, NULL},
};

PyType_Spec identifier_spec = {
    .name = "shmepoch._native.Identifier",
    .basicsize = sizeof(Identifier),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = identifier_slots,
};

/* encode(value) -> its bytes, if it is an identifier; a plain number, if it is one of another type,
 * such as numpy's, that msgspec does not know */
static PyObject *
identifier_encode(PyObject *module, PyObject *value)
{
    ModuleState *state = PyModule_GetState(module);
    if (PyObject_TypeCheck(value, state->identifier_type)) {
        return identifier_bytes(value, NULL);
    }
    if (PyIndex_Check(value)) {
        return PyNumber_Index(value);
    }
    if (PyFloat_Check(value)) {
        return PyFloat_FromDouble(PyFloat_AsDouble(value));
    }
    return refuse(PyExc_NotImplementedError, Py_TYPE(value), "is not part of a record", value);
}

/* decode(kind, raw) -> kind(raw), if that is a kind of identifier */
static PyObject *
identifier_decode(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    ModuleState *state = PyModule_GetState(module);
    if (nargs != 2) {
        return PyErr_Format(PyExc_TypeError, "decode takes 2 arguments, not %zd", nargs);
    }
    if (!PyType_Check(args[0]) || !PyType_IsSubtype((PyTypeObject *)args[0], state->identifier_type)) {
        return PyErr_Format(PyExc_TypeError, "%R is no kind of identifier", args[0]);
    }
    return make((PyTypeObject *)args[0], args[1]);
}

PyMethodDef identifier_functions[] = {
    {"encode", identifier_encode, METH_O, NULL},
    {"decode", (PyCFunction)(void (*)(void))identifier_decode, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
