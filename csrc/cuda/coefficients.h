// The coefficients of a block per sample and channel, from its norm's statistics and weights, FiLM's gamma and beta and
// dropout: what is pending on the output of its convolution, v = g * (act(a * (y - p) + b) - q) + s.
//
// They agree with kernels/coefficients.py, which has their gradients, and with fastfilm/ops/reference/coefficients.py.
// Group and layer norm, whose statistics cross channels, are not covered.
#pragma once

#include "calls.h"
#include "merge.h"

namespace fastfilm::cuda {

FF_DEVICE float number(const Numbers& of, int64_t n, int64_t channel, float absent) {
  if (!of.data) return absent;
  const int64_t i = n * of.pitch + channel * of.step;
  if (of.storage == kBFloat16) return to_float(static_cast<const BFloat16*>(of.data)[i]);
  if (of.storage == kFloat16) return to_float(static_cast<const Float16*>(of.data)[i]);
  return static_cast<const float*>(of.data)[i];
}

FF_DEVICE void move(const Numbers& of, int64_t channel, float value, float momentum) {
  const float old = number(of, 0, channel, 0), moved = old + momentum * (value - old);
  if (of.storage == kBFloat16) {
    from_float(moved, static_cast<BFloat16*>(of.data)[channel]);
  } else if (of.storage == kFloat16) {
    from_float(moved, static_cast<Float16*>(of.data)[channel]);
  } else {
    static_cast<float*>(of.data)[channel] = moved;
  }
}

// One channel of a block.
struct BlockChannel {
  const Block& block;
  int64_t n, c, channel;  // samples and channels of the map, and which one it is
  float shift;  // of the convolution's bias, where the norm comes first

  FF_DEVICE float dropout(int64_t sample, int where) const {
    return block.position == where ? number(block.mask, sample, channel, 1) : 1.0f;
  }
  FF_DEVICE float mean(int64_t sample) const {
    return (block.stats[sample * c + channel] + shift) * dropout(sample, kBeforeNorm);
  }
  FF_DEVICE float variance(int64_t sample) const {
    const float s = dropout(sample, kBeforeNorm);
    return block.stats[(n + sample) * c + channel] * s * s;
  }

  // Mean and variance over all samples.
  FF_DEVICE void over_samples(float& centre, float& total) const {
    centre = total = 0;
    for (int64_t i = 0; i < n; ++i) centre += mean(i);
    centre = centre / static_cast<float>(n);
    for (int64_t i = 0; i < n; ++i) {
      const float d = mean(i) - centre;
      total += variance(i) + d * d;
    }
    total = total / static_cast<float>(n);
  }

  FF_DEVICE void move_statistics(float centre, float total) const {
    move(block.running_mean, channel, centre, block.momentum);
    move(block.running_var, channel, total * block.unbiased, block.momentum);
  }
  // Those of instance norm move by the mean over the samples.
  FF_DEVICE void move_by_samples() const {
    float centre = 0, total = 0;
    for (int64_t i = 0; i < n; ++i) {
      centre += mean(i);
      total += variance(i);
    }
    move_statistics(centre / static_cast<float>(n), total / static_cast<float>(n));
  }

  // The coefficients of one sample, with the statistics that all samples share where it has none of its own.
  FF_DEVICE void write(int64_t sample, float centre, float total) const {
    const bool normed = block.norm != kNoNorm, own = block.uses_input && block.norm == kInstanceNorm;
    const float s = dropout(sample, kBeforeNorm), bias = number(block.bias, 0, channel, 0);
    float k = 1, offset = shift, pivot = 0;
    if (normed) {
      pivot = centre - shift;
      if (own || (block.uses_input && block.position == kBeforeNorm)) pivot = block.stats[sample * c + channel];
      if (own) {
        centre = mean(sample);
        total = variance(sample);
      }
      const float factor = number(block.norm_weight, 0, channel, 1) / sqrtf(total + block.eps);
      k = factor * s;
      offset = ((pivot + shift) * s - centre) * factor + number(block.norm_bias, 0, channel, 0);
    }
    const float film = number(block.gamma, sample, channel, 1) * dropout(sample, kBeforeFilm);
    const float beta = number(block.beta, sample, channel, 0), end = dropout(sample, kEnd);
    float row[kCoefRows] = {1, bias, end, 0, pivot, 0, number(block.slope, 0, channel, block.slope_value)};
    if (block.order == kNormFilmAct) {
      row[kA] = k * film;
      row[kB] = offset * film + beta;
    } else if (block.order == kNormActFilm) {
      row[kA] = k;
      row[kB] = offset;
      row[kG] = film * end;
      row[kS] = beta * end;
    } else {
      row[kG] = k * film * end;
      row[kS] = (offset * film + beta) * end;
      row[kP] = 0;
      row[kQ] = pivot;
    }
    for (int r = 0; r < kCoefRows; ++r) block.coef[(r * n + sample) * c + channel] = row[r];
  }
};

// The coefficients of the kMergeColumns channels from `first` on, by a block of kMergeThreads threads, and their running
// statistics. The threads of a channel share the samples out.
FF_DEVICE void write_coefficients(const Block& block, int64_t n, int64_t c, int64_t first) {
  const int row = thread_index() / kMergeColumns;
  const int64_t channel = merge_channel(first);
  if (channel >= c) return;
  const BlockChannel here{block, n, c, channel, block.order == kActNormFilm ? 0.0f : number(block.bias, 0, channel, 0)};
  const bool moves = block.update && row == 0;
  float centre = 0, total = 1;
  if (block.norm != kNoNorm && !block.uses_input) {
    centre = number(block.running_mean, 0, channel, 0);
    total = number(block.running_var, 0, channel, 1);
  } else if (block.norm == kBatchNorm) {
    here.over_samples(centre, total);
    if (moves) here.move_statistics(centre, total);
  } else if (block.norm == kInstanceNorm && moves) {
    here.move_by_samples();
  }
  for (int64_t sample = row; sample < n; sample += kMergeThreads / kMergeColumns) here.write(sample, centre, total);
}

}  // namespace fastfilm::cuda
