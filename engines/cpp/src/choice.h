// The next tokens, chosen on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace fuselage {

// Writes the index of the largest of each row of `logits` [B, V], of several the first, to `tokens` [B].
void choose(const float* logits, std::int64_t vocab_size, std::vector<std::int64_t>& tokens);

}  // namespace fuselage
