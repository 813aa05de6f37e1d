/* The model: made by edgebuild, do not edit. */
#ifndef MODEL_H
#define MODEL_H

#define MODEL_CONVERTER "emlearn 0.23.2"
#define MODEL_INPUTS 4
#define MODEL_OUTPUTS 2

/* MODEL_INPUTS floats in, MODEL_OUTPUTS floats out, in the order of the ONNX model; 0 where all is well. Not reentrant. */
int mcu_digits_run(const float *input, float *output);

#endif
