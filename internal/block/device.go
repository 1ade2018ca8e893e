package block

import "context"

// Flags modify one request.
type Flags uint8

const (
	// FUA asks for durability before the answer. Every acknowledged write is
	// durable anyway (W1) unless the volume is write-back.
	FUA Flags = 1 << iota
	// NoHole asks WriteZeroes to keep space allocated. Firn may ignore it: the
	// blocks read as zero either way.
	NoHole
	// FastZero asks WriteZeroes to fail with Unsupported unless it is faster
	// than writing zeros.
	FastZero
)

// Geometry is what a client is shown of a device.
type Geometry struct {
	// Name and ID of the volume.
	Name string
	ID   VolumeID
	// SizeBytes is a multiple of LogicalBlockBytes.
	SizeBytes int64
	// LogicalBlockBytes is 512 or 4096: what SCSI addresses by. Devices accept
	// any byte range; this is what they advise.
	LogicalBlockBytes int
	// PreferredBytes is the block size that costs no read-modify-write.
	PreferredBytes int
	// MaxBytes bounds one read or write.
	MaxBytes int
	// ReadOnly devices refuse every change with kind ReadOnly.
	ReadOnly bool
}

// ExtentState says what a range holds. The zero value is data.
type ExtentState uint8

const (
	// Data is allocated.
	Data ExtentState = iota
	// Hole is not allocated and reads as zero.
	Hole
	// Zero is known to read as zero (written so or discarded).
	Zero
)

// Extent is a run of bytes in one state.
type Extent struct {
	Bytes int64
	State ExtentState
}

// Device is a block device: the one interface between the frontends and
// storage. All offsets and lengths are bytes and need no alignment. Every
// method may be called by many goroutines at once. Two overlapping requests in
// flight at once are applied in either order, block by block; a request that
// starts after another was answered sees its effect.
//
// Every method fails with kind OutOfRange beyond the size, Fenced when a newer
// attachment took the volume, Canceled when ctx ended first (the operation may
// still take effect), Corrupt when no good copy of a block was found. Where an
// answer cannot be had now, methods wait until it can or ctx ends.
type Device interface {
	// Geometry returns the current geometry. It changes when the volume grows.
	Geometry() Geometry

	// ReadAt fills p with the bytes at off. On error p's content is undefined.
	// p is the caller's again on return.
	ReadAt(ctx context.Context, p []byte, off int64) error

	// WriteAt writes p at off. On return without error the bytes are durable on
	// a majority of their replicas (W1). p is not kept after the return. On
	// error each block holds either its old or its new bytes.
	// Kinds ReadOnly, NoSpace.
	WriteAt(ctx context.Context, p []byte, off int64, f Flags) error

	// Flush returns when every write answered before the call is durable.
	Flush(ctx context.Context) error

	// Trim lets go of the bytes in [off, off+n): they read as zero from then
	// on, durably. n may be up to the whole device.
	Trim(ctx context.Context, off, n int64, f Flags) error

	// WriteZeroes makes [off, off+n) read as zero, durably.
	WriteZeroes(ctx context.Context, off, n int64, f Flags) error

	// Extents appends to dst the states of the bytes from off on, neighbours
	// merged, until n bytes are covered or max extents were appended. At least
	// one extent is appended when n > 0.
	Extents(ctx context.Context, dst []Extent, off, n int64, max int) ([]Extent, error)
}

// Lent is memory that a device lends until Release.
type Lent interface {
	// Bytes stays unchanged until Release.
	Bytes() []byte
	// Release gives the memory back. Calling it twice is a bug.
	Release()
}

// MemoryReader is a Device that can answer some reads from memory at once.
type MemoryReader interface {
	// ReadMemory returns the n bytes at off if memory holds all of them
	// current, without blocking and without copying.
	ReadMemory(off int64, n int) (Lent, bool)
}

// Prefetcher is a Device that can bring bytes closer.
type Prefetcher interface {
	// Prefetch starts to bring [off, off+n) into the cache and returns.
	Prefetch(ctx context.Context, off, n int64) error
}

// ResizeNotifier is a Device that tells when its geometry changed.
type ResizeNotifier interface {
	// NotifyResize calls f after each change of geometry until stop is called.
	NotifyResize(f func(Geometry)) (stop func())
}
