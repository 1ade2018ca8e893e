// Package gateway stands between the frontends and the cluster. A Volume is one
// attached volume as a block.Device: it checks bounds, reads what an unaligned
// write leaves of its edge blocks, splits at the borders that storage has, and
// sees to it that no two writes to overlapping blocks are ever in flight (W2)
// and that only a definite answer frees a block (W4). A Gateway holds the
// volumes that are open and attaches them on demand.
//
// Volume's write path is a single-threaded core on the gateway's Loop. The
// blocking block.Device over it, and Gateway, are in files named shell*.go:
// what can be done in the caller's own goroutine (copies, checksums, limits) is
// done there, and nothing else starts a goroutine per operation.
package gateway

import (
	"context"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// MaxPieceBytes bounds what one call to a Backend moves. Pieces do not cross
// its multiples within a volume, and so no chunk border.
const MaxPieceBytes = block.MaxEntryBytes

// Backend is an attached volume: where a Volume keeps its data. All methods
// and all callbacks are called on the gateway's Loop, the callbacks exactly
// once, after the call has returned.
//
// Write, Zero and Mark answer only when it is certain whether they took effect
// and that they cannot take effect later (W4): they may take any time. Until
// then the caller does not change the same blocks again. Kinds of errors:
// Fenced when the attachment is over, OutOfRange, ReadOnly, NoSpace, Invalid.
type Backend interface {
	// Geometry is the volume as it is to be shown to clients now.
	Geometry() block.Geometry
	// Watch says whom to tell. changed: Geometry has changed. ended: the
	// attachment is over, and every operation fails with that error from now on.
	Watch(changed func(), ended func(error))

	// Write stores p, whole blocks, from block at of chunk c on. It takes over
	// the caller's hold of p. crcs has one block.CRC per block; p and crcs stay
	// as they are until done.
	Write(c block.Chunk, at block.Index, p *payload.Buf, crcs []uint32, done func(error))
	// Zero makes count blocks of chunk c zero.
	Zero(c block.Chunk, at block.Index, count int, done func(error))
	// Mark makes the whole chunks [from, to) zero, at a cost that does not
	// depend on their number.
	Mark(from, to block.Chunk, done func(error))

	// Read gives count blocks of chunk c, whole blocks per piece, in order. The
	// slice is the callee's again when done returns; the buffers are the
	// caller's. It is given up, with kind Canceled, some time after ctx ended.
	Read(ctx context.Context, c block.Chunk, at block.Index, count int, done func([]payload.Piece, error))
	// Map gives the states of chunks from the first byte of chunk from on:
	// neighbours merged, covering at least chunk from, and nothing from chunk to
	// on. The slice is the caller's. ctx as in Read.
	Map(ctx context.Context, from, to block.Chunk, done func([]block.Extent, error))

	// Close ends the attachment and answers when others can attach the volume.
	// What is in flight fails with kind Canceled.
	Close(done func(error))
}
