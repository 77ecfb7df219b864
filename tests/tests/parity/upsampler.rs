//! upsampler
