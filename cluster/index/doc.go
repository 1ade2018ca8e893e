// Package index is the replicated state of the groups of one disk: what apply
// changes, what reads ask, and what a restart finds. It is a single-threaded
// core; rules S, W3, W5 and F2 of docs/rules.md are made true here, the bytes
// are in docs/format/index.md.
//
// A DB holds the replicas of one disk over one Store. A Replica's state lies in
// three layers, from new to old:
//
//	delta    what was applied since the last freeze; in memory, changed in place
//	frozen   the delta of a checkpoint that is being merged; never changed
//	store    one atomic batch per finished checkpoint
//
// Extents are immutable: at most 16 blocks, never across a 64 KiB boundary of
// their chunk, named by (volume, chunk, block, generation, written). Which one
// a view sees is decided block by block by (generation, written), never by
// layer; layers decide ties only, which a move of garbage collection makes (S10).
// So apply needs no look-up: it adds to the delta (S6), and a merge, which reads
// the 64 KiB cells that the delta touched, finds what became garbage.
//
// Blocking work (merges, reaping, flushes, look-ups that the memory cannot
// answer) is handed out as values with a part to run off the Loop and a part to
// finish on it. Nothing of this package blocks on the Loop.
package index
