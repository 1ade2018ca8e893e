package seglog

import (
	"firn.io/firn/internal/block"
)

// MaxStoreBlocks bounds the blocks of one Store.
const MaxStoreBlocks = moveBlocks

// Store writes blocks that came from another replica: what the records name, of
// which bytes holds the payload, one after the other, in a payload.Buf's memory.
// On the disk they are moved blocks.
//
// placed is called on the Loop with the records that a batch made durable, To
// set; at once, for until the index counts them as held nothing keeps their
// segment. done is called after the last of them, or with an error, which is
// final for the disk. Until then moves and bytes belong to the log. The caller
// leaves room: survivors may take the last free segment.
func (l *Log) Store(moves []Move, bytes []byte, placed func([]Move), done func(error)) {
	if l.refused(done) {
		return
	}
	blocks := 0
	for i := range moves {
		blocks += len(moves[i].CRCs)
	}
	if blocks == 0 || blocks > MaxStoreBlocks || blocks*block.Size != len(bytes) {
		panic("seglog: what is to be stored is not what its records say")
	}
	l.w.moves = append(l.w.moves, &moveBatch{moves: moves, payload: bytes, placed: placed, done: done})
	l.pumpLater()
}
