// Fails the n-th write, fsync or rename below a folder. Preloaded into a process of test_faults.py,
// which arms it; it counts from 0 and fails once.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { WRITE, FSYNC, RENAME };
enum { SHORT = -1 };

static char folder[PATH_MAX];
static int failing, kind;
static long failing_call;
static _Atomic long calls; // files are written side by side

void fault_arm(const char *where, int operation, long call, int how) {
    strncpy(folder, where, sizeof folder - 1);
    failing = operation;
    failing_call = call;
    kind = how;
    calls = 0;
}

long fault_calls(void) { return calls; }

static int is_due(int operation, const char *path) {
    if (folder[0] == 0 || operation != failing || strncmp(path, folder, strlen(folder)) != 0) return 0;
    return calls++ == failing_call;
}

static int is_due_for(int operation, int descriptor) {
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0) return 0;
    path[length] = 0;
    return is_due(operation, path);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    static ssize_t (*original)(int, const void *, size_t);
    if (!original) *(void **)&original = dlsym(RTLD_NEXT, "write");
    if (is_due_for(WRITE, descriptor)) {
        if (kind == SHORT && size > 1) return original(descriptor, data, size / 2);
        if (kind != SHORT) {
            errno = kind;
            return -1;
        }
    }
    return original(descriptor, data, size);
}

int fsync(int descriptor) {
    static int (*original)(int);
    if (!original) *(void **)&original = dlsym(RTLD_NEXT, "fsync");
    if (is_due_for(FSYNC, descriptor)) {
        errno = kind;
        return -1;
    }
    return original(descriptor);
}

int rename(const char *from, const char *to) {
    static int (*original)(const char *, const char *);
    if (!original) *(void **)&original = dlsym(RTLD_NEXT, "rename");
    if (is_due(RENAME, from)) {
        errno = kind;
        return -1;
    }
    return original(from, to);
}
