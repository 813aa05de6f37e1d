/* The golden example: made by edgebuild, do not edit. */
#ifndef GOLDEN_H
#define GOLDEN_H

#define GOLDEN_SAMPLES 1
#define GOLDEN_OUTPUTS 2
#define GOLDEN_ABSOLUTE 0.0001f
#define GOLDEN_RELATIVE 0.001f

static const float golden_inputs[1][4] = {
    {1.93e+00f, -3.4e-01f, -1.72e+00f, -2.25e+00f},
};

static const float golden_outputs[1][2] = {
    {7.72e+00f, 0.e+00f},
};

#endif
