package index

import (
	"encoding/binary"

	"firn.io/firn/internal/block"
)

// formatVersion is of the whole store. A build refuses to open another.
const formatVersion = 1

// cellBlocks is the alignment that extents never cross: a look-up for a block
// begins at most 15 blocks before it.
const cellBlocks = block.MaxExtentBlocks

func corrupt(what string, p []byte) error {
	return block.Errorf(block.Corrupt, "index: %s of %d bytes does not decode (%.32x)", what, len(p), p)
}

// stored is a decoded extent value.
type stored struct {
	count uint8 // blocks, 1..16
	place Place
	crcs  []uint32 // one per block; none of zeros
}

// The first byte of an extent: bits 0-3 are the number of blocks less one, 4-5
// the kind, 6 says that the bytes are a frame. Bit 7 is 0.
const (
	extentKindShift = 4
	extentFramed    = 1 << 6
	extentReserved  = 1 << 7
)

func appendExtent(dst []byte, e *stored) []byte {
	head := e.count - 1 | byte(e.place.Kind)<<extentKindShift
	if e.place.Framed {
		head |= extentFramed
	}
	dst = append(dst, head)
	switch e.place.Kind {
	case KindZero:
		return dst
	case KindLocal:
		dst = binary.AppendUvarint(dst, uint64(e.place.At.Segment))
		dst = binary.LittleEndian.AppendUint16(dst, e.place.At.Block)
	case KindCold:
		dst = binary.AppendUvarint(dst, uint64(e.place.Object))
		dst = binary.LittleEndian.AppendUint32(dst, e.place.Offset)
	}
	if e.place.Framed {
		dst = append(dst, e.place.Skip, e.place.Codec)
		dst = binary.LittleEndian.AppendUint32(dst, uint32(e.place.Key))
		dst = binary.LittleEndian.AppendUint32(dst, e.place.Stored)
	}
	for _, c := range e.crcs {
		dst = binary.LittleEndian.AppendUint32(dst, c)
	}
	return dst
}

// decodeExtent decodes the value of an extent that begins at block first. The
// CRCs are appended to crcs, which e.crcs is a part of.
func decodeExtent(e *stored, first uint16, p []byte, crcs []uint32) ([]uint32, error) {
	whole := p
	if len(p) == 0 || p[0]&extentReserved != 0 {
		return crcs, corrupt("extent", whole)
	}
	head := p[0]
	p = p[1:]
	*e = stored{count: head&15 + 1}
	e.place.Kind = Kind(head >> extentKindShift & 3)
	e.place.Framed = head&extentFramed != 0
	if first%cellBlocks+uint16(e.count) > cellBlocks {
		return crcs, corrupt("extent", whole)
	}
	switch e.place.Kind {
	case KindZero:
		if len(p) != 0 || e.place.Framed {
			return crcs, corrupt("zero extent", whole)
		}
		return crcs, nil
	case KindLocal, KindCold:
		n, width := binary.Uvarint(p)
		if width <= 0 || n > 1<<32-1 || width > 1 && p[width-1] == 0 {
			return crcs, corrupt("extent", whole)
		}
		p = p[width:]
		if e.place.Kind == KindCold {
			if len(p) < 4 || !e.place.Framed {
				return crcs, corrupt("cold extent", whole)
			}
			e.place.Object, e.place.Offset = uint32(n), binary.LittleEndian.Uint32(p)
			p = p[4:]
		} else {
			if len(p) < 2 {
				return crcs, corrupt("extent", whole)
			}
			e.place.At.Segment, e.place.At.Block = segmentID(n), binary.LittleEndian.Uint16(p)
			p = p[2:]
		}
	default:
		return crcs, corrupt("extent", whole)
	}
	if e.place.Framed {
		if len(p) < 10 || p[0] > cellBlocks-e.count {
			return crcs, corrupt("framed extent", whole)
		}
		e.place.Skip, e.place.Codec = p[0], p[1]
		e.place.Key = block.KeyID(binary.LittleEndian.Uint32(p[2:]))
		e.place.Stored = binary.LittleEndian.Uint32(p[6:])
		p = p[10:]
	} else if int(e.place.At.Block)+int(e.count) > 1<<16 {
		return crcs, corrupt("extent", whole)
	}
	if len(p) != 4*int(e.count) {
		return crcs, corrupt("extent", whole)
	}
	from := len(crcs)
	for ; len(p) > 0; p = p[4:] {
		crcs = append(crcs, binary.LittleEndian.Uint32(p))
	}
	e.crcs = crcs[from:]
	return crcs, nil
}

// part returns the blocks [from, from+n) of an extent as one of their own.
func (e *stored) part(from, n uint8) stored {
	p := stored{count: n, place: e.place.forward(uint16(from))}
	if e.place.Kind != KindZero {
		p.crcs = e.crcs[from : from+n]
	}
	return p
}

// forward is the place of the block n blocks further.
func (p Place) forward(n uint16) Place {
	switch {
	case p.Framed:
		p.Skip += uint8(n)
	case p.Kind == KindLocal:
		p.At.Block += n
	}
	return p
}

// object is a cold object that a chunk's extents may lie in.
type object struct {
	number uint32 // within the chunk, never used again
	bytes  uint64
	name   string
}

// chunkRecord is the record of a chunk (S2).
type chunkRecord struct {
	version block.Version // last change of content
	changed block.Version // last change of anything
	objects []object
}

// plain tells whether version says everything.
func (c *chunkRecord) plain() bool { return c.changed == c.version && len(c.objects) == 0 }

const (
	chunkChanged = 1 << 0
	chunkObjects = 1 << 1
	chunkKnown   = chunkChanged | chunkObjects
)

func appendChunk(dst []byte, c *chunkRecord) []byte {
	var flags byte
	if c.changed != c.version {
		flags |= chunkChanged
	}
	if len(c.objects) > 0 {
		flags |= chunkObjects
	}
	dst = append(dst, flags)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(c.version))
	if flags&chunkChanged != 0 {
		dst = binary.LittleEndian.AppendUint64(dst, uint64(c.changed))
	}
	for _, o := range c.objects {
		dst = binary.LittleEndian.AppendUint32(dst, o.number)
		dst = binary.LittleEndian.AppendUint64(dst, o.bytes)
		dst = append(append(dst, byte(len(o.name))), o.name...)
	}
	return dst
}

func decodeChunk(p []byte) (c chunkRecord, err error) {
	whole := p
	if len(p) < 9 || p[0]&^chunkKnown != 0 {
		return c, corrupt("chunk record", whole)
	}
	flags := p[0]
	c.version = block.Version(binary.LittleEndian.Uint64(p[1:]))
	c.changed = c.version
	p = p[9:]
	if flags&chunkChanged != 0 {
		if len(p) < 8 {
			return c, corrupt("chunk record", whole)
		}
		c.changed = block.Version(binary.LittleEndian.Uint64(p))
		p = p[8:]
		if c.changed == c.version {
			return c, corrupt("chunk record", whole)
		}
	}
	if (flags&chunkObjects != 0) != (len(p) > 0) {
		return c, corrupt("chunk record", whole)
	}
	for len(p) > 0 {
		if len(p) < 13 || len(p) < 13+int(p[12]) || p[12] == 0 {
			return c, corrupt("chunk record", whole)
		}
		n := 13 + int(p[12])
		c.objects = append(c.objects, object{
			number: binary.LittleEndian.Uint32(p),
			bytes:  binary.LittleEndian.Uint64(p[4:]),
			name:   string(p[13:n]),
		})
		p = p[n:]
	}
	return c, nil
}

func appendVersion(dst []byte, v block.Version) []byte {
	return binary.LittleEndian.AppendUint64(dst, uint64(v))
}

func decodeVersion(p []byte) (block.Version, error) {
	if len(p) != 8 {
		return 0, corrupt("range marker", p)
	}
	return block.Version(binary.LittleEndian.Uint64(p)), nil
}

// groupRecord is the record of a group.
type groupRecord struct {
	applied, term uint64
	era           uint16
	feature       uint32
	volumes       uint32 // the highest number given to a volume
	conf          []byte
}

const (
	recordVersion = 1
	groupFixed    = 1 + 8 + 8 + 2 + 4 + 4
)

func appendGroup(dst []byte, g *groupRecord) []byte {
	dst = append(dst, recordVersion)
	dst = binary.LittleEndian.AppendUint64(dst, g.applied)
	dst = binary.LittleEndian.AppendUint64(dst, g.term)
	dst = binary.LittleEndian.AppendUint16(dst, g.era)
	dst = binary.LittleEndian.AppendUint32(dst, g.feature)
	dst = binary.LittleEndian.AppendUint32(dst, g.volumes)
	return append(dst, g.conf...)
}

func decodeGroup(p []byte) (g groupRecord, err error) {
	if len(p) < groupFixed {
		return g, corrupt("group record", p)
	}
	if p[0] != recordVersion {
		return g, block.Errorf(block.Unsupported, "index: group record of version %d", p[0])
	}
	g.applied = binary.LittleEndian.Uint64(p[1:])
	g.term = binary.LittleEndian.Uint64(p[9:])
	g.era = binary.LittleEndian.Uint16(p[17:])
	g.feature = binary.LittleEndian.Uint32(p[19:])
	g.volumes = binary.LittleEndian.Uint32(p[23:])
	g.conf = append([]byte(nil), p[groupFixed:]...)
	if g.applied > block.MaxRaftIndex {
		return g, corrupt("group record", p)
	}
	return g, nil
}
