/* Vectors and start of a Cortex-M that a bootloader jumped to: memory as C wants it, then main. */
#include "board.h"

#include <stdint.h>

extern uint32_t stack_top[], data_load[], data_start[], data_end[], bss_start[], bss_end[];
int main(void);
void reset(void);

static void fault(void)
{
    board_end(2);
}

/* The stack's top, reset, then the fourteen exceptions that every Cortex-M has. */
__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault, fault,
    fault, fault, fault, fault, fault, fault, fault, fault,
};

void reset(void)
{
    *(volatile uintptr_t *)0xE000ED08 = (uintptr_t)vectors; /* VTOR: exceptions are ours from here on */
    for (uint32_t *from = data_load, *to = data_start; to < data_end;) {
        *to++ = *from++;
    }
    for (uint32_t *to = bss_start; to < bss_end;) {
        *to++ = 0;
    }
    board_end(main());
}
