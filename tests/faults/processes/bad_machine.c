/* bad_machine.c: the machine below Redis. Logs each sync, and on request has a wrong clock, a
 * full disk or a slow one.
 *
 * Loaded with LD_PRELOAD. FSYNC_LOG names the log of the file's length at the start of each sync that
 * then succeeded: a power cut may lose the bytes behind the last entry. MACHINE_STATE names a file of
 * one `struct state`, which the test process maps as well.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct state {
    int64_t clock_offset_us;
    int64_t sync_delay_us;
    int64_t disk_full;
};

static const struct state well;
static const volatile struct state *state = &well;

__attribute__((constructor)) static void map_state(void) {
    const char *path = getenv("MACHINE_STATE");
    int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    void *found = mmap(NULL, sizeof(struct state), PROT_READ, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) state = found;
    close(fd);
}

static int synced(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    struct stat before;
    int known = fstat(fd, &before) == 0;
    if (state->sync_delay_us > 0) usleep((useconds_t)state->sync_delay_us);
    int result = real(fd);
    const char *log = getenv("FSYNC_LOG");
    if (result == 0 && known && log != NULL) {
        char link[64], path[512], line[640];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, sizeof path - 1);
        int out = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (length > 0 && out >= 0) {
            ssize_t (*put)(int, const void *, size_t) =
                (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
            path[length] = 0;
            int size = snprintf(line, sizeof line, "%lld %s\n", (long long)before.st_size, path);
            if (put(out, line, size) != size) abort();
        }
        if (out >= 0) close(out);
    }
    return result;
}

int fsync(int fd) { return synced("fsync", fd); }
int fdatasync(int fd) { return synced("fdatasync", fd); }

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (real == NULL) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    struct stat file;
    if (state->disk_full && fstat(fd, &file) == 0 && S_ISREG(file.st_mode)) {
        errno = ENOSPC;
        return -1;
    }
    return real(fd, data, size);
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (real == NULL) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(tv, zone);
    if (result == 0 && state->clock_offset_us != 0) {
        int64_t us = (int64_t)tv->tv_sec * 1000000 + tv->tv_usec + state->clock_offset_us;
        tv->tv_sec = us / 1000000;
        tv->tv_usec = us % 1000000;
    }
    return result;
}

time_t time(time_t *at) {
    struct timeval now;
    gettimeofday(&now, NULL);
    if (at != NULL) *at = now.tv_sec;
    return now.tv_sec;
}
