package wire

import (
	"encoding/binary"

	"firn.io/firn/internal/block"
)

// reader takes little-endian fields off p. After the first field that is not
// there, short is set and all further fields read as zero.
type reader struct {
	p     []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.p) {
		r.short, r.p = true, nil
		return nil
	}
	b := r.p[:n]
	r.p = r.p[n:]
	return b
}

func (r *reader) u8() uint8 {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (r *reader) uuid() (u [16]byte) {
	copy(u[:], r.take(16))
	return u
}

// crcs appends n checksums to dst, which are there or nothing is allocated.
func (r *reader) crcs(dst []uint32, n int) []uint32 {
	b := r.take(4 * n)
	if len(b) > 0 && cap(dst)-len(dst) < n {
		dst = append(make([]uint32, 0, len(dst)+n), dst...)
	}
	for ; len(b) >= 4; b = b[4:] {
		dst = append(dst, binary.LittleEndian.Uint32(b))
	}
	return dst
}

// value copies n bytes; nil for none.
func (r *reader) value(n int) []byte {
	return append([]byte(nil), r.take(n)...)
}

func appendU16(dst []byte, v uint16) []byte { return binary.LittleEndian.AppendUint16(dst, v) }
func appendU32(dst []byte, v uint32) []byte { return binary.LittleEndian.AppendUint32(dst, v) }
func appendU64(dst []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(dst, v) }

func appendCRCs(dst []byte, crcs []uint32) []byte {
	for _, c := range crcs {
		dst = appendU32(dst, c)
	}
	return dst
}

// end checks that exactly everything was taken.
func (r *reader) end(what string) error {
	switch {
	case r.short:
		return block.Errorf(block.Invalid, "%s is cut short", what)
	case len(r.p) != 0:
		return block.Errorf(block.Invalid, "%s has %d bytes too many", what, len(r.p))
	}
	return nil
}
