// The activations of a block, for the kernels of both extensions.
//
// Their places in the list are their numbers; ACTIVATION_CODES in fastfilm/ops/spec/names.py has the names.
#pragma once

namespace fastfilm {

// Expands to `item(kNone, ...) item(kReLU, ...) ...`, one for each activation.
// clang-format off
#define FASTFILM_EACH_ACTIVATION(item, ...) \
  item(kNone, __VA_ARGS__)                  \
  item(kReLU, __VA_ARGS__)                  \
  item(kLeakyReLU, __VA_ARGS__)             \
  item(kELU, __VA_ARGS__)                   \
  item(kSiLU, __VA_ARGS__)                  \
  item(kGELU, __VA_ARGS__)                  \
  item(kGELUTanh, __VA_ARGS__)
// clang-format on

#define FASTFILM_NAME(name, ...) name,
enum Activation { FASTFILM_EACH_ACTIVATION(FASTFILM_NAME) kActivations };
#undef FASTFILM_NAME

}  // namespace fastfilm
