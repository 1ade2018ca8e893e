package nbd

import (
	"sync"
)

// headroom is the space before a buffer's data for the header of a reply, so
// that header and data are one piece of memory.
const headroom = 64

var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, maxPiece}

var bufferPools [len(bufferSizes)]sync.Pool

// buffer is pooled payload memory. It belongs to one request at a time.
type buffer struct {
	raw []byte
	// from and to bound what is to be sent or written; data starts at headroom.
	from, to int
	class    int
	charge   charge
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
	b, _ := bufferPools[class].Get().(*buffer)
	if b == nil {
		b = &buffer{raw: make([]byte, headroom+bufferSizes[class]), class: class}
	}
	b.from, b.to, b.charge = headroom, headroom+n, c
	return b
}

// free gives the memory and its charge back.
func (b *buffer) free() {
	b.charge.release()
	b.charge = charge{}
	bufferPools[b.class].Put(b)
}
