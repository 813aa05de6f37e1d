/* Runs the golden example on this device. It prints every output's bits, PASS or FAIL and, last, the evidence as one line of JSON;
   it ends with 1 after a FAIL. */
#include "board.h"
#include "golden.h"
#include "model.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

static void put_digits(uint32_t value, int least)
{
    char text[11];
    int place = 10;
    text[place] = 0;
    while (value || least > 0) {
        text[--place] = (char)('0' + value % 10);
        value /= 10;
        least -= 1;
    }
    board_put(text + place);
}

/* Six digits behind the point; "null" where it is no number below four thousand. */
static void put_number(float value)
{
    if (!(value < 4000.0f)) {
        board_put("null");
        return;
    }
    const uint32_t millionths = (uint32_t)(value * 1e6f);
    put_digits(millionths / 1000000, 1);
    board_put(".");
    put_digits(millionths % 1000000, 6);
}

static void put_bits(float value)
{
    char text[10] = " 00000000";
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    for (int place = 8; place; place--) {
        text[place] = "0123456789abcdef"[bits & 15];
        bits >>= 4;
    }
    board_put(text);
}

/* The largest difference from the golden outputs, as a share of the tolerance: above 1 is a failure. */
static float worst(void)
{
    static float found[GOLDEN_OUTPUTS];
    float share = 0.0f;
    for (int sample = 0; sample < GOLDEN_SAMPLES; sample++) {
        if (mcu_digits_run(golden_inputs[sample], found) != 0) {
            return INFINITY;
        }
        board_put("outputs");
        for (int output = 0; output < GOLDEN_OUTPUTS; output++) {
            const float expected = golden_outputs[sample][output];
            const float one = fabsf(found[output] - expected) / (GOLDEN_ABSOLUTE + GOLDEN_RELATIVE * fabsf(expected));
            put_bits(found[output]);
            if (!(one <= share)) {
                share = one < INFINITY ? one : INFINITY; /* what is no number is a failure too */
            }
        }
        board_put("\n");
    }
    return share;
}

int main(void)
{
    const float share = worst();
    const char *verdict = share <= 1.0f ? "PASS" : "FAIL";
    board_put(verdict);
    board_put(" differs by ");
    put_number(share);
    board_put(" of the tolerance\n{\"bundle\": \"");
    board_put("mcu-digits");
    board_put("\", \"version\": \"");
    board_put("1.2.3");
    board_put("\", \"verdict\": \"");
    board_put(verdict);
    board_put("\", \"measurements\": [{\"name\": \"golden_error\", \"phase\": \"self-test\", \"value\": ");
    put_number(share);
    board_put(", \"unit\": \"share of the tolerance\", \"n\": ");
    put_digits(GOLDEN_SAMPLES, 1);
    board_put(", \"runtime\": \"" MODEL_CONVERTER ", gcc " __VERSION__ "\", \"machine\": \"");
    board_put(board_name);
    board_put("\"}]}\n");
    return share <= 1.0f ? 0 : 1;
}
