/* Stands in for HCCL's collectives between ranks of one host: the functions that vllm-ascend's pyhccl_wrapper.py calls,
   with their signatures, over sockets. Device memory is host memory here (stub_cann.c), and every call has ended when it
   returns. Two ranks that disagree about the bytes of a broadcast get an error; on cards they would hang or be torn. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { DONE = 0, LOST = 6, DIFFERENT = 7, MOST_RANKS = 16, ROOT_INFO_BYTES = 4108, WAIT_S = 3 };
struct comm { int rank, ranks, peers[MOST_RANKS]; };

static int listening[MOST_RANKS], made;
static const size_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16}; /* of hcclDataTypeEnum */

static socklen_t address_of(const char *id, struct sockaddr_un *address) { /* abstract: no file is left */
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  strncpy(address->sun_path + 1, id, sizeof address->sun_path - 2);
  return sizeof *address;
}

static void limit(int peer) {
  struct timeval wait = {WAIT_S, 0};
  setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
  setsockopt(peer, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
}

static int move(int peer, char *at, size_t bytes, int out) {
  while (bytes) {
    ssize_t part = out ? send(peer, at, bytes, MSG_NOSIGNAL) : recv(peer, at, bytes, 0);
    if (part <= 0) return LOST;
    at += part;
    bytes -= part;
  }
  return DONE;
}

const char *HcclGetErrorString(int code) {
  return code == LOST ? "a rank was lost" : code == DIFFERENT ? "ranks gave different sizes" : "unknown";
}

int HcclGetRootInfo(char *id) {
  struct sockaddr_un address;
  int number = made++ % MOST_RANKS, server = socket(AF_UNIX, SOCK_STREAM, 0);
  memset(id, 0, ROOT_INFO_BYTES);
  sprintf(id, "npd-stub-hccl-%d-%d", (int)getpid(), made);
  id[64] = number;
  if (bind(server, (struct sockaddr *)&address, address_of(id, &address)) || listen(server, MOST_RANKS)) return LOST;
  limit(server);
  listening[number] = server;
  return DONE;
}

int HcclCommInitRootInfo(unsigned ranks, const char *id, unsigned rank, void **made_comm) {
  struct comm *comm = calloc(1, sizeof *comm);
  struct sockaddr_un address;
  comm->rank = rank;
  comm->ranks = ranks;
  *made_comm = comm;
  if (rank == 0) {
    for (unsigned other = 1; other < ranks; other++) {
      int who, peer = accept(listening[(int)id[64]], NULL, NULL);
      if (peer < 0) return LOST;
      limit(peer);
      if (move(peer, (char *)&who, sizeof who, 0)) return LOST;
      comm->peers[who] = peer;
    }
    close(listening[(int)id[64]]);
    return DONE;
  }
  comm->peers[0] = socket(AF_UNIX, SOCK_STREAM, 0);
  if (connect(comm->peers[0], (struct sockaddr *)&address, address_of(id, &address))) return LOST;
  limit(comm->peers[0]);
  return move(comm->peers[0], (char *)&comm->rank, sizeof comm->rank, 1);
}

int HcclBroadcast(void *buffer, uint64_t count, int type, unsigned root, void *handle, void *stream) {
  struct comm *comm = handle;
  uint64_t bytes = count * sizes[type], theirs;
  if (root != 0) return DIFFERENT;
  if (comm->rank) {
    if (move(comm->peers[0], (char *)&theirs, sizeof theirs, 0)) return LOST;
    return theirs != bytes ? DIFFERENT : move(comm->peers[0], buffer, bytes, 0);
  }
  for (int other = 1; other < comm->ranks; other++)
    if (move(comm->peers[other], (char *)&bytes, sizeof bytes, 1) || move(comm->peers[other], buffer, bytes, 1))
      return LOST;
  return DONE;
}

int HcclAllReduce(const float *in, float *out, uint64_t count, int type, int sum, void *handle, void *stream) {
  struct comm *comm = handle;
  float theirs;
  if (type != 4 || sum != 0 || count != 1) return DIFFERENT; /* one float32: the warm-up of a communicator */
  *out = *in;
  for (int other = comm->rank ? 0 : 1; other < (comm->rank ? 1 : comm->ranks); other++) {
    if (comm->rank && move(comm->peers[0], (char *)in, sizeof *in, 1)) return LOST;
    if (!comm->rank && move(comm->peers[other], (char *)&theirs, sizeof theirs, 0)) return LOST;
    if (!comm->rank) *out += theirs;
  }
  if (comm->rank) return move(comm->peers[0], (char *)out, sizeof *out, 0);
  for (int other = 1; other < comm->ranks; other++)
    if (move(comm->peers[other], (char *)out, sizeof *out, 1)) return LOST;
  return DONE;
}

int HcclCommDestroy(void *handle) {
  struct comm *comm = handle;
  for (int other = 0; other < MOST_RANKS; other++)
    if (comm->peers[other]) close(comm->peers[other]);
  free(comm);
  return DONE;
}
