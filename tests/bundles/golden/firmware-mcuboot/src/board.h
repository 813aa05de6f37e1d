/* What the self-test asks of a board. For yours, write these three; board_semihosting.c and board_host.c are examples. */
#ifndef BOARD_H
#define BOARD_H

extern const char board_name[];

/* Print a text. */
void board_put(const char *text);

/* End the program, with 0 where all is well. */
void board_end(int status);

#endif
