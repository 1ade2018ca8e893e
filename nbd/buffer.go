package nbd

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// headroom is the space before a buffer's data for the header of a reply, so
// that header and data are one piece of memory.
const headroom = 64

var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, maxPiece}

// pooled is how many of the bufferSizes, from the smallest, live in the
// garbage collector's heap; the others are pages of their own.
const pooled = 2

var (
	bufferPools [pooled]sync.Pool
	bufferPages [len(bufferSizes) - pooled]pages
)

// keptPages is what all bufferPages hold ready beyond what is in use.
var keptPages atomic.Int64

// pages are buffers outside of the garbage collector's heap. In it, what clients
// who read no replies make the server hold would be held twice over: the
// collector lets a heap grow to double of what is live.
type pages struct {
	mu sync.Mutex
	// warm buffers have memory, cold ones only their addresses.
	warm, cold []*buffer
}

// get returns a buffer, or nil if the kernel gives none.
func (p *pages) get(class int) *buffer {
	size := bufferSizes[class]
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.warm); n > 0 {
		b := p.warm[n-1]
		p.warm = p.warm[:n-1]
		keptPages.Add(-int64(size))
		return b
	}
	if n := len(p.cold); n > 0 {
		b := p.cold[n-1]
		p.cold = p.cold[:n-1]
		return b
	}
	m, err := unix.Mmap(-1, 0, pageBytes+size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil
	}
	// The data start a page, as direct I/O wants it.
	return &buffer{raw: m[pageBytes-headroom:], class: class, mapped: m}
}

func (p *pages) put(b *buffer) {
	size := int64(bufferSizes[b.class])
	cold := keptPages.Add(size) > maxKeptPages
	if cold {
		keptPages.Add(-size)
		// Should it fail, the memory stays; the addresses are used again.
		_ = unix.Madvise(b.mapped, unix.MADV_DONTNEED)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if cold {
		p.cold = append(p.cold, b)
	} else {
		p.warm = append(p.warm, b)
	}
}

// buffer is pooled payload memory. It belongs to one request at a time.
type buffer struct {
	raw []byte
	// from and to bound what is to be sent or written; data starts at headroom.
	from, to int
	class    int
	charge   charge
	// mapped is nil for a buffer in the garbage collector's heap.
	mapped []byte
}

// data returns the payload.
func (b *buffer) data() []byte { return b.raw[headroom:b.to] }

// wire returns the header, if one was put before the data, and the payload.
func (b *buffer) wire() []byte { return b.raw[b.from:b.to] }

// head puts a header of at most headroom bytes before the data.
func (b *buffer) head(h []byte) {
	b.from = headroom - len(h)
	copy(b.raw[b.from:], h)
}

func bufferClass(n int) int {
	class := 0
	for bufferSizes[class] < n {
		class++
	}
	return class
}

// bufferCost is what a buffer of n bytes takes of the budgets.
func bufferCost(n int) int64 { return int64(bufferSizes[bufferClass(n)] + headroom) }

// newBuffer returns a buffer of n <= maxPiece bytes, which c has paid for.
func newBuffer(n int, c charge) *buffer {
	class := bufferClass(n)
	var b *buffer
	if class < pooled {
		b, _ = bufferPools[class].Get().(*buffer)
	} else {
		b = bufferPages[class-pooled].get(class)
	}
	if b == nil {
		b = &buffer{raw: make([]byte, headroom+bufferSizes[class]), class: class}
	}
	b.from, b.to, b.charge = headroom, headroom+n, c
	return b
}

// free gives the memory and its charge back.
func (b *buffer) free() {
	paid := b.charge
	b.charge = charge{}
	switch {
	case b.class < pooled:
		bufferPools[b.class].Put(b)
	case b.mapped != nil:
		bufferPages[b.class-pooled].put(b)
	}
	paid.release()
}
