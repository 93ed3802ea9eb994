/*
 * A disk that fails, for a program that is started with this library in LD_PRELOAD.
 *
 * FAULT_FILE is the file whose disk it is, FAULT_FOLDER a folder in which the test says what happens, by files:
 *   full       writes find no room (ENOSPC)
 *   fail-sync  the next sync fails once (EIO), and what was written since the last good one is lost, as where the
 *              kernel has dropped the pages that it could not write: the file reads as it was then
 *   hold       that sync waits before it fails, and says so by `syncing`
 * `medium` there is what the disk has: a copy of the file as the last good sync left it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_the_file(int fd) {
  struct stat it, file;
  const char *path = getenv("FAULT_FILE");
  return path && !fstat(fd, &it) && !stat(path, &file) && it.st_dev == file.st_dev && it.st_ino == file.st_ino;
}

static const char *said(const char *name, char *path) {
  snprintf(path, PATH_MAX, "%s/%s", getenv("FAULT_FOLDER"), name);
  return path;
}

static int is_said(const char *name) {
  char path[PATH_MAX];
  return access(said(name, path), F_OK) == 0;
}

typedef ssize_t write_at(int, const void *, size_t, off_t);

/* Makes one file what another one is. */
static void copy(const char *from, const char *to) {
  static char block[65536];
  write_at *real = (write_at *)dlsym(RTLD_NEXT, "pwrite64");
  int in = open(from, O_RDONLY);
  int out = open(to, O_WRONLY | O_CREAT, 0600);
  off_t at = 0;
  for (ssize_t got; (got = pread(in, block, sizeof block, at)) > 0; at += got)
    if (real(out, block, (size_t)got, at) != got) abort();
  if (ftruncate(out, at)) abort();
  close(in);
  close(out);
}

int fdatasync(int fd) {
  char path[PATH_MAX];
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
  if (!is_the_file(fd)) return real(fd);
  if (!is_said("fail-sync")) {
    if (real(fd)) return -1;
    copy(getenv("FAULT_FILE"), said("medium", path));
    return 0;
  }
  unlink(said("fail-sync", path));
  close(open(said("syncing", path), O_WRONLY | O_CREAT, 0600));
  while (is_said("hold")) usleep(1000);
  copy(said("medium", path), getenv("FAULT_FILE"));
  errno = EIO;
  return -1;
}

static int is_full(int fd) {
  if (!is_the_file(fd) || !is_said("full")) return 0;
  errno = ENOSPC;
  return 1;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) {
  return is_full(fd) ? -1 : ((write_at *)dlsym(RTLD_NEXT, "pwrite"))(fd, bytes, length, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off_t at) {
  return is_full(fd) ? -1 : ((write_at *)dlsym(RTLD_NEXT, "pwrite64"))(fd, bytes, length, at);
}
