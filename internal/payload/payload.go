// Package payload holds the reference-counted buffers that user data travels
// in from a socket to a disk without being copied: a frame reader fills one,
// Raft carries only its id, transport and seglog attach it.
package payload

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Align is the alignment of every buffer's first byte, for O_DIRECT.
const Align = 4096

// Buf is a buffer with a count of holders. The holder that releases it last
// gives its memory back; bytes must not be read or written after the own
// release. Once a buffer is shared its bytes are not changed.
type Buf struct {
	b    []byte
	refs atomic.Int32
	pool *sync.Pool
	full []byte
}

// Piece is one part of the answer to a read: Bytes of Buf from Off on, of which
// the receiver has one hold, or Bytes zeros if Buf is nil.
type Piece struct {
	Bytes, Off int
	Buf        *Buf
}

// Data returns the piece's bytes; nil for zeros.
func (p Piece) Data() []byte {
	if p.Buf == nil {
		return nil
	}
	return p.Buf.Bytes()[p.Off:][:p.Bytes]
}

// The size classes, powers of two from 4 KiB to 1 MiB.
const minShift, maxShift = 12, 20

var pools [maxShift - minShift + 1]sync.Pool

// New returns a buffer of n bytes with one holder, the caller. Its content is
// undefined. Buffers over 1 MiB are not pooled.
func New(n int) *Buf {
	shift := minShift
	for shift <= maxShift && n > 1<<shift {
		shift++
	}
	if shift > maxShift {
		b := aligned(n)
		return newBuf(&Buf{full: b}, n)
	}
	p := &pools[shift-minShift]
	buf, ok := p.Get().(*Buf)
	if !ok {
		buf = &Buf{full: aligned(1 << shift), pool: p}
	}
	return newBuf(buf, n)
}

func newBuf(b *Buf, n int) *Buf {
	b.b = b.full[:n]
	b.refs.Store(1)
	return b
}

func aligned(n int) []byte {
	b := make([]byte, n+Align)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & (Align - 1))
	return b[skip : skip+n : skip+n]
}

// Copy returns a new buffer with p's bytes.
func Copy(p []byte) *Buf {
	b := New(len(p))
	copy(b.b, p)
	return b
}

// Bytes returns the content. It is valid until the caller's own Release.
func (b *Buf) Bytes() []byte { return b.b }

// Len returns the length in bytes.
func (b *Buf) Len() int { return len(b.b) }

// Retain adds a holder and returns b.
func (b *Buf) Retain() *Buf {
	if b.refs.Add(1) <= 1 {
		panic("payload: retained after the last release")
	}
	return b
}

// Release ends one holder's use.
func (b *Buf) Release() {
	switch n := b.refs.Add(-1); {
	case n > 0:
	case n < 0:
		panic(fmt.Sprintf("payload: released %d times too often", -n))
	case b.pool != nil:
		b.b = nil
		b.pool.Put(b)
	}
}
