// A disk that refuses calls below a folder, or kills the process at one of them. Preloaded into the
// programs of test_faults.py and test_refusals.py, which say what it does; calls count from 0.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { WRITE, FSYNC, RENAME, OPEN, RENAMEAT2, SYMLINK, FLOCK, TRUNCATE, MKDIR, UNLINK, CLOSE, COUNT };
enum { ANY = -1 };
// The last is a disk that becomes full: one write is short, and those after it fail.
enum { SHORT = -1, KILL = -2, FULL = -3 };
enum { GO_ON = 0 };

static char folder[PATH_MAX];
static int failing, kind, lasts, is_full, refused[COUNT];
static long failing_call;
static _Atomic long calls; // files are written side by side

// From here on the given call of an operation (or of ANY) fails with the errno `how`, is SHORT if it
// is a write, or is where the process is killed; with `on` so do all calls after it.
void fault_arm(const char *where, int operation, long call, int how, int on) {
    strncpy(folder, where, sizeof folder - 1);
    failing = operation;
    failing_call = call;
    kind = how;
    lasts = on;
    is_full = 0;
    calls = 0;
}

// From here on an operation always fails with this errno; 0: it does not.
void fault_refuse(int operation, int how) { refused[operation] = how; }

long fault_calls(void) { return calls; }

// Returns the errno to fail with, GO_ON, or what `write` carries out.
static int fate_of(int operation, const char *path) {
    if (folder[0] == 0 || strncmp(path, folder, strlen(folder)) != 0) return GO_ON;
    int is_counted = failing == ANY || operation == failing;
    long call = is_counted ? calls++ : -1;
    if (is_counted && (call == failing_call || (lasts && call > failing_call))) {
        if (kind == KILL && operation != WRITE) kill(getpid(), SIGKILL);
        return kind;
    }
    return refused[operation] ? refused[operation] : GO_ON;
}

static int fails(int operation, const char *path) {
    int fate = fate_of(operation, path);
    if (fate <= 0) return 0;
    errno = fate;
    return 1;
}

static void path_of(int descriptor, char *path) {
    char link[64];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = saved;
    path[length < 0 ? 0 : length] = 0;
}

static int fails_for(int operation, int descriptor) {
    char path[PATH_MAX];
    path_of(descriptor, path);
    return fails(operation, path);
}

static int fails_at(int operation, int directory, const char *name) {
    char path[2 * PATH_MAX];
    if (name[0] == '/' || directory == AT_FDCWD) return fails(operation, name);
    path_of(directory, path);
    snprintf(path + strlen(path), PATH_MAX, "/%s", name);
    return fails(operation, path);
}

#define ORIGINAL(type, name, ...)                                                                  \
    static type (*original)(__VA_ARGS__);                                                          \
    if (!original) *(void **)&original = dlsym(RTLD_NEXT, #name)

ssize_t write(int descriptor, const void *data, size_t size) {
    ORIGINAL(ssize_t, write, int, const void *, size_t);
    char path[PATH_MAX];
    path_of(descriptor, path);
    int fate = fate_of(WRITE, path);
    if (fate == FULL && is_full) fate = ENOSPC;
    if (fate > 0) {
        errno = fate;
        return -1;
    }
    is_full = is_full || fate == FULL;
    if (fate != GO_ON && size > 1) size /= 2;
    ssize_t written = original(descriptor, data, size);
    if (fate == KILL) kill(getpid(), SIGKILL);
    return written;
}

// What is not lost by a kill need not reach the disk in a test.
int fsync(int descriptor) {
    ORIGINAL(int, fsync, int);
    if (fails_for(FSYNC, descriptor)) return -1;
    return folder[0] ? 0 : original(descriptor);
}

int rename(const char *from, const char *to) {
    ORIGINAL(int, rename, const char *, const char *);
    return fails(RENAME, from) ? -1 : original(from, to);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    ORIGINAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return fails_at(RENAMEAT2, from_at, from) ? -1 : original(from_at, from, to_at, to, flags);
}

int symlink(const char *target, const char *path) {
    ORIGINAL(int, symlink, const char *, const char *);
    return fails(SYMLINK, path) ? -1 : original(target, path);
}

int flock(int descriptor, int operation) {
    ORIGINAL(int, flock, int, int);
    return fails_for(FLOCK, descriptor) ? -1 : original(descriptor, operation);
}

int mkdir(const char *path, mode_t mode) {
    ORIGINAL(int, mkdir, const char *, mode_t);
    return fails(MKDIR, path) ? -1 : original(path, mode);
}

int unlink(const char *path) {
    ORIGINAL(int, unlink, const char *);
    return fails(UNLINK, path) ? -1 : original(path);
}

int rmdir(const char *path) {
    ORIGINAL(int, rmdir, const char *);
    return fails(UNLINK, path) ? -1 : original(path);
}

int unlinkat(int directory, const char *path, int flags) {
    ORIGINAL(int, unlinkat, int, const char *, int);
    return fails_at(UNLINK, directory, path) ? -1 : original(directory, path, flags);
}

// A file is closed whatever close says.
int close(int descriptor) {
    ORIGINAL(int, close, int);
    int is_failing = fails_for(CLOSE, descriptor), saved = errno, closed = original(descriptor);
    if (is_failing) errno = saved;
    return is_failing ? -1 : closed;
}

#define TRUNCATES(name, of_path)                                                                   \
    int of_path(const char *path, off64_t length) {                                                \
        ORIGINAL(int, of_path, const char *, off64_t);                                             \
        return fails(TRUNCATE, path) ? -1 : original(path, length);                                \
    }                                                                                              \
    int name(int descriptor, off64_t length) {                                                     \
        ORIGINAL(int, name, int, off64_t);                                                         \
        return fails_for(TRUNCATE, descriptor) ? -1 : original(descriptor, length);                \
    }
TRUNCATES(ftruncate, truncate)
TRUNCATES(ftruncate64, truncate64)

#define OPENS(name, name_at)                                                                       \
    int name(const char *path, int flags, ...) {                                                   \
        ORIGINAL(int, name, const char *, int, ...);                                               \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                              \
        return fails(OPEN, path) ? -1 : original(path, flags, mode);                               \
    }                                                                                              \
    int name_at(int directory, const char *path, int flags, ...) {                                 \
        ORIGINAL(int, name_at, int, const char *, int, ...);                                       \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                              \
        return fails_at(OPEN, directory, path) ? -1 : original(directory, path, flags, mode);      \
    }
OPENS(open, openat)
OPENS(open64, openat64)
