/* The limit of one consumer: librabbitmq, every message acked by itself, nothing decoded.
 *   limit HOST PORT VHOST QUEUE PREFETCH MESSAGES
 * Prints a JSON object: the rate and the CPU seconds per 10,000 messages. Without arguments it prints
 * the library's version. */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void check(amqp_rpc_reply_t reply, const char *what) {
  if (reply.reply_type != AMQP_RESPONSE_NORMAL) {
    fprintf(stderr, "limit: %s failed\n", what);
    exit(1);
  }
}

int main(int argc, char **argv) {
  if (argc == 1) return puts(amqp_version()) < 0;
  if (argc != 7) return 2;
  int prefetch = atoi(argv[5]), messages = atoi(argv[6]);
  amqp_connection_state_t conn = amqp_new_connection();
  amqp_socket_t *sock = amqp_tcp_socket_new(conn);
  if (!sock || amqp_socket_open(sock, argv[1], atoi(argv[2]))) return 1;
  check(amqp_login(conn, argv[3], 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, "guest", "guest"), "login");
  amqp_channel_open(conn, 1);
  check(amqp_get_rpc_reply(conn), "channel.open");
  amqp_basic_qos(conn, 1, 0, prefetch, 0);
  amqp_basic_consume(conn, 1, amqp_cstring_bytes(argv[4]), amqp_empty_bytes, 0, 0, 0,
                     amqp_empty_table);
  check(amqp_get_rpc_reply(conn), "basic.consume");
  double began = 0, cpu = 0;
  for (int i = 0; i < messages; i++) {
    amqp_envelope_t envelope;
    amqp_maybe_release_buffers(conn);
    check(amqp_consume_message(conn, &envelope, NULL, 0), "consume");
    if (!i) began = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    amqp_basic_ack(conn, 1, envelope.delivery_tag, 0);
    amqp_destroy_envelope(&envelope);
  }
  began = now(CLOCK_MONOTONIC) - began, cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  printf("{\"rate\": %f, \"cpu_per_10k\": %f}\n", messages / began, cpu / messages * 1e4);
  amqp_connection_close(conn, AMQP_REPLY_SUCCESS);
  return 0;
}
