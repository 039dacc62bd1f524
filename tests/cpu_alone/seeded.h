// Which of the faults that test_seeded_bugs.py wrote into the sources is there in this process.
#pragma once
#include <cstdlib>

inline const int seeded_fault = std::atoi(std::getenv("MNV2_SEEDED_FAULT"));
