/* Samples of where the main thread of a Python process is, taken by the thread itself in a signal.

   `prepare(folder)` is called in the process, with the GIL. A first SIGRTMIN+8 then starts a timer of
   the thread's own processor time, `PERIOD_NS` apart or what the kernel's tick makes of it: what the
   thread waits for, be it the processor, counts for nothing. Each time the thread writes down the addresses of its innermost
   C frames, up to the first that is no library's, and the code objects of its Python frames. A second
   one stops the timer and writes `folder/PID`. Nothing stops the process, and no other process reads
   it, so that a sample costs a few microseconds. Invariants: a handler allocates nothing and calls
   nothing of Python; the names of a code object are read when it is first seen, while it runs. */

#define _GNU_SOURCE
#define Py_BUILD_CORE
#include <Python.h>
#if PY_VERSION_HEX < 0x030b0000 || PY_VERSION_HEX >= 0x030e0000
#error "the layout of frames is known for Python 3.11 to 3.13"
#endif
#include <internal/pycore_frame.h>

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <unwind.h>

#define PERIOD_NS 1009000
#define MOST_C 24
#define MOST_PYTHON 64
#define MOST_CODES 8192
#define MOST_WORDS (6 << 20)
#define NAME_BYTES 192

struct code {
    PyCodeObject *key;
    char file[NAME_BYTES], name[NAME_BYTES];
};

static char place[512];
static PyThreadState *thread;
static uintptr_t eval_begin, eval_end;
static pid_t thread_id;
static timer_t timer;
static bool running;
static struct code codes[MOST_CODES];
static uint64_t words[MOST_WORDS]; /* a sample: addresses, their count, codes, their count */
static size_t used, samples, lost, own_ns;

static void text(char *to, PyObject *from) {
    to[0] = 0;
    if (!from || !PyUnicode_IS_COMPACT_ASCII(from)) return;
    Py_ssize_t length = ((PyASCIIObject *)from)->length;
    if (length >= NAME_BYTES) { /* the end says more than the beginning */
        memcpy(to, (char *)((PyASCIIObject *)from + 1) + length - NAME_BYTES + 1, NAME_BYTES - 1);
        length = NAME_BYTES - 1;
    } else {
        memcpy(to, (char *)((PyASCIIObject *)from + 1), length);
    }
    to[length] = 0;
}

static uint64_t index_of(PyCodeObject *code) {
    size_t at = ((uintptr_t)code >> 4) % MOST_CODES;
    for (size_t tries = 0; tries < MOST_CODES; tries++, at = (at + 1) % MOST_CODES) {
        if (codes[at].key == code) return at;
        if (codes[at].key) continue;
        codes[at].key = code;
        text(codes[at].file, code->co_filename);
        text(codes[at].name, code->co_qualname);
        return at;
    }
    return MOST_CODES;
}

struct walk {
    uintptr_t interrupted;
    bool found;
    uint64_t *out;
    size_t count;
};

static _Unwind_Reason_Code step(struct _Unwind_Context *context, void *argument) {
    struct walk *walk = argument;
    uintptr_t at = _Unwind_GetIP(context);
    if (!walk->found && at != walk->interrupted) return _URC_NO_REASON; /* the handler's own */
    walk->found = true;
    walk->out[walk->count++] = at;
    bool ended = walk->count == MOST_C || (at >= eval_begin && at < eval_end);
    return ended ? _URC_END_OF_STACK : _URC_NO_REASON;
}

static uintptr_t interrupted_at(ucontext_t *stood) {
#if defined(__x86_64__)
    return stood->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
    return stood->uc_mcontext.pc;
#else
#error "registers are known of x86-64 and arm64"
#endif
}

static void sample(void *context) {
    if (used + MOST_C + MOST_PYTHON + 2 > MOST_WORDS) {
        lost++;
        return;
    }
    uintptr_t interrupted = interrupted_at(context);
    struct walk walk = {interrupted, false, words + used, 0};
    _Unwind_Backtrace(step, &walk);
    if (!walk.count) walk.out[walk.count++] = interrupted;
    used += walk.count;
    words[used++] = walk.count;
    size_t count = 0;
#if PY_VERSION_HEX >= 0x030d0000
    struct _PyInterpreterFrame *frame = thread->current_frame;
#else
    struct _PyInterpreterFrame *frame = thread->cframe->current_frame;
#endif
    for (; frame && count < MOST_PYTHON; frame = frame->previous) {
#if PY_VERSION_HEX >= 0x030d0000
        PyObject *code = frame->f_executable;
#else
        PyObject *code = (PyObject *)frame->f_code;
#endif
        if (!code || Py_TYPE(code) != &PyCode_Type) continue;
        words[used + count++] = index_of((PyCodeObject *)code);
    }
    used += count;
    words[used++] = count;
    samples++;
}

static void due(int number, siginfo_t *info, void *context) {
    (void)number;
    (void)info;
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    sample(context);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    own_ns += (ended.tv_sec - began.tv_sec) * 1000000000 + ended.tv_nsec - began.tv_nsec;
}

static void put(int file, const void *what, size_t length) {
    while (length) {
        ssize_t done = write(file, what, length);
        if (done <= 0) _exit(70);
        what = (const char *)what + done;
        length -= done;
    }
}

static void toggle(int number) {
    if (syscall(SYS_gettid) != thread_id) {
        syscall(SYS_tgkill, getpid(), thread_id, number);
        return;
    }
    struct itimerspec every = {{0, PERIOD_NS}, {0, PERIOD_NS}}, never = {{0, 0}, {0, 0}};
    running = !running;
    timer_settime(timer, 0, running ? &every : &never, NULL);
    if (running) {
        used = samples = lost = own_ns = 0;
        return;
    }
    int file = open(place, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0) _exit(70);
    uint64_t head[] = {samples, lost, own_ns, used, MOST_CODES, NAME_BYTES, eval_begin, eval_end};
    put(file, head, sizeof head);
    put(file, words, used * sizeof *words);
    put(file, codes, sizeof codes);
    close(file);
}

/* Returns 0, or what could not be had. */
int prepare(const char *folder) {
    Dl_info info;
    ElfW(Sym) *symbol = NULL;
    void *eval = dlsym(RTLD_DEFAULT, "_PyEval_EvalFrameDefault");
    if (!eval || !dladdr1(eval, &info, (void **)&symbol, RTLD_DL_SYMENT) || !symbol) return 1;
    eval_begin = (uintptr_t)eval;
    eval_end = eval_begin + symbol->st_size;
    thread = PyThreadState_Get();
    snprintf(place, sizeof place, "%s/%d", folder, getpid());
    struct walk walk = {0, true, words, 0};
    _Unwind_Backtrace(step, &walk); /* loads what it needs */
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 9};
    event._sigev_un._tid = thread_id = syscall(SYS_gettid);
    if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer)) return 2;
    struct sigaction action = {.sa_flags = SA_RESTART | SA_SIGINFO};
    sigfillset(&action.sa_mask);
    action.sa_sigaction = due;
    if (sigaction(SIGRTMIN + 9, &action, NULL)) return 3;
    struct sigaction on = {.sa_flags = SA_RESTART, .sa_handler = toggle};
    sigfillset(&on.sa_mask);
    return sigaction(SIGRTMIN + 8, &on, NULL) ? 4 : 0;
}
