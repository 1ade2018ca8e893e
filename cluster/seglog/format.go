package seglog

import (
	"encoding/binary"

	"firn.io/firn/internal/block"
)

// The format of a batch, docs/format/seglog.md. A header area of whole blocks
// (a fixed part, then records) is followed by the payloads of its records, in
// the order of the records, each beginning on a block.
const (
	formatVersion = 1
	batchMagic    = 0x4c4e5246 // "FRNL"
	fixedBytes    = 128
	crcOffset     = 124
	// maxHeaderBytes bounds the header area: a reader allocates that much on the
	// word of a block whose CRC is not checked yet.
	maxHeaderBytes = 512 << 10
)

// batchKind says what a batch is for.
type batchKind uint8

const (
	kindWrites batchKind = 1 // sections of replicas
	kindMoves  batchKind = 2 // records moved by collection
	kindTable  batchKind = 3 // opens a segment: all replicas, claimed segments, voided numbers
	kindSeal   batchKind = 4 // ends a segment: nothing follows
)

// Streams keep survivors of collection apart from what is fresh, so that what
// has lived long stays together.
const (
	fresh = iota
	survivors
	numStreams
)

// position is where the next batch of a stream goes; segment 0 if the stream
// has none open.
type position struct {
	segment SegmentID
	block   uint32
}

// header is the fixed part of a batch.
type header struct {
	kind       batchKind
	stream     uint8
	cluster    block.ClusterID
	disk       block.DiskID
	segment    SegmentID
	block      uint32 // of the segment, where this header is
	generation uint64 // number of the batch that opened the segment
	number     uint64 // of this batch; per disk, over all streams, never used twice
	// durable is the highest number that was synced when this header was made.
	durable       uint64
	headerBytes   uint32 // fixed part and records
	payloadBlocks uint32
	records       uint32
	// tails are where the streams stood before this batch: a chain that breaks
	// before its tail has rotted.
	tails [numStreams]position
}

func blocksOf(n int) uint32 { return uint32((n + block.Size - 1) / block.Size) }

func (h *header) headerBlocks() uint32 { return blocksOf(int(h.headerBytes)) }

// next is the block after the batch.
func (h *header) next() uint32 { return h.block + h.headerBlocks() + h.payloadBlocks }

var le = binary.LittleEndian

// put writes the fixed part into p, with a CRC of 0.
func (h *header) put(p []byte) {
	le.PutUint32(p[0:], batchMagic)
	le.PutUint16(p[4:], formatVersion)
	p[6], p[7] = byte(h.kind), h.stream
	copy(p[8:24], h.cluster[:])
	copy(p[24:40], h.disk[:])
	le.PutUint32(p[40:], uint32(h.segment))
	le.PutUint32(p[44:], h.block)
	le.PutUint64(p[48:], h.generation)
	le.PutUint64(p[56:], h.number)
	le.PutUint64(p[64:], h.durable)
	le.PutUint32(p[72:], h.headerBytes)
	le.PutUint32(p[76:], h.payloadBlocks)
	le.PutUint32(p[80:], h.records)
	for i, t := range h.tails {
		le.PutUint32(p[84+8*i:], uint32(t.segment))
		le.PutUint32(p[88+8*i:], t.block)
	}
	clear(p[84+8*numStreams : fixedBytes])
}

// sealHeader puts the CRC of the header area into it. Payload CRCs are in place.
func sealHeader(area []byte) {
	le.PutUint32(area[crcOffset:], 0)
	le.PutUint32(area[crcOffset:], block.CRC(area))
}

// decodeFixed reads the fixed part and checks that its lengths can be. It says
// nothing about the rest of the header area: see checkArea.
func decodeFixed(p []byte) (h header, ok bool) {
	if len(p) < fixedBytes || le.Uint32(p) != batchMagic || le.Uint16(p[4:]) != formatVersion {
		return h, false
	}
	h.kind, h.stream = batchKind(p[6]), p[7]
	copy(h.cluster[:], p[8:24])
	copy(h.disk[:], p[24:40])
	h.segment = SegmentID(le.Uint32(p[40:]))
	h.block = le.Uint32(p[44:])
	h.generation = le.Uint64(p[48:])
	h.number = le.Uint64(p[56:])
	h.durable = le.Uint64(p[64:])
	h.headerBytes = le.Uint32(p[72:])
	h.payloadBlocks = le.Uint32(p[76:])
	h.records = le.Uint32(p[80:])
	for i := range h.tails {
		h.tails[i] = position{SegmentID(le.Uint32(p[84+8*i:])), le.Uint32(p[88+8*i:])}
	}
	const most = MaxSegmentBytes / block.Size
	ok = h.kind >= kindWrites && h.kind <= kindSeal && h.stream < numStreams &&
		h.headerBytes >= fixedBytes && h.headerBytes <= maxHeaderBytes && h.block < most && h.payloadBlocks < most &&
		h.generation <= h.number && h.durable < h.number
	return h, ok
}

// checkArea tells whether the header area, of headerBytes, is whole.
func checkArea(area []byte) bool {
	var zero [4]byte
	crc := block.CRC(area[:crcOffset])
	crc = block.UpdateCRC(crc, zero[:])
	crc = block.UpdateCRC(crc, area[crcOffset+4:])
	return crc == le.Uint32(area[crcOffset:])
}

// Types of records.
const (
	recSection  = 1
	recMove     = 2
	recSegments = 3
	recVoids    = 4
)

// Flags of a section.
const (
	sectionCreate  = 1 << iota // the replica begins here
	sectionRemove              // and ends here
	sectionReset               // all entries before this section are void (L6)
	sectionDamaged             // in a state table: a recovery found it damaged (L4)
)

// section is what a batch says about one replica: always its whole state after
// the section, so that a later one makes up for a lost earlier one, and entries.
type section struct {
	key   ReplicaKey
	flags uint8
	hard  HardState
	trunc EntryID
	last  uint64 // last index of the log after this section
	// prev is the term of the entry before entries[0], or of last without
	// entries: it tells when what stood there was overwritten by a batch that
	// has rotted.
	prev    uint64
	first   uint64 // index of entries[0]
	entries []entryRecord
}

// entryRecord is one entry in a header area.
type entryRecord struct {
	term         uint64
	crc          uint32 // of the whole payload
	payloadBytes uint32
	payload      uint32 // block of the segment where it begins
	data         []byte // part of the area
}

// moveRecord is one moved record in a header area.
type moveRecord struct {
	Record
	payload uint32
}

// segmentUse names a generation of a segment.
type segmentUse struct {
	id         SegmentID
	generation uint64
}

// void is a range of batch numbers, both ends included, that a recovery cut
// off, and a segment that may still hold some of it. No batch of that range
// ever counts again (L3).
//
// Where there are too many such segments to name, it is of anySegment.
type void struct {
	from, to uint64
	segment  SegmentID
}

// anySegment stands for all that were not written since.
const anySegment SegmentID = 0

// batch is a decoded header area.
type batch struct {
	header
	area     []byte // what it was decoded from
	sections []section
	moves    []moveRecord
	claimed  []segmentUse
	voids    []void
}

// encoder builds a header area in a buffer that it is lent.
type encoder struct {
	area    []byte
	records uint32
}

func newEncoder(buf []byte) encoder { return encoder{area: buf[:fixedBytes]} }

// sectionBytes bounds an encoded section without entries; entryBytes an entry
// without its data; moveBytes a moved record without its CRCs.
const (
	sectionBytes = 2 + 11*binary.MaxVarintLen64
	entryBytes   = 4 + 3*binary.MaxVarintLen64
	moveBytes    = 1 + 16 + 7*binary.MaxVarintLen64
)

func (e *encoder) section(s *section, entries int) {
	a := append(e.area, recSection, s.flags)
	for _, v := range [...]uint64{uint64(s.key.Group), uint64(s.key.Replica), s.hard.Term, s.hard.Vote, s.hard.Commit,
		s.trunc.Index, s.trunc.Term, s.last, s.prev, uint64(entries)} {
		a = binary.AppendUvarint(a, v)
	}
	if entries > 0 {
		a = binary.AppendUvarint(a, s.first)
	}
	e.area = a
	e.records++
}

// entry appends an entry of the last section and returns where the CRC of its
// payload belongs.
func (e *encoder) entry(x *Entry, payloadBytes int) (crcAt int) {
	crcAt = len(e.area)
	a := append(e.area, 0, 0, 0, 0)
	a = binary.AppendUvarint(a, x.Term)
	a = binary.AppendUvarint(a, uint64(len(x.Data)))
	a = binary.AppendUvarint(a, uint64(payloadBytes))
	e.area = append(a, x.Data...)
	return crcAt
}

func (e *encoder) move(r *Record) {
	a := append(e.area, recMove)
	a = binary.AppendUvarint(a, uint64(r.Key.Group))
	a = binary.AppendUvarint(a, uint64(r.Key.Replica))
	a = append(a, r.Volume[:]...)
	for _, v := range [...]uint64{uint64(r.Chunk), uint64(r.Block), uint64(len(r.CRCs)), uint64(r.Generation), uint64(r.Written)} {
		a = binary.AppendUvarint(a, v)
	}
	for _, c := range r.CRCs {
		a = le.AppendUint32(a, c)
	}
	e.area = a
	e.records++
}

func (e *encoder) segments(uses []segmentUse) {
	a := binary.AppendUvarint(append(e.area, recSegments), uint64(len(uses)))
	for _, u := range uses {
		a = binary.AppendUvarint(a, uint64(u.id))
		a = binary.AppendUvarint(a, u.generation)
	}
	e.area = a
	e.records++
}

func (e *encoder) voids(voids []void) {
	a := binary.AppendUvarint(append(e.area, recVoids), uint64(len(voids)))
	for _, v := range voids {
		a = binary.AppendUvarint(a, v.from)
		a = binary.AppendUvarint(a, v.to-v.from)
		a = binary.AppendUvarint(a, uint64(v.segment))
	}
	e.area = a
	e.records++
}

// finish fills in the fixed part and returns the area padded to whole blocks.
func (e *encoder) finish(h *header) []byte {
	h.headerBytes = uint32(len(e.area))
	h.records = e.records
	h.put(e.area)
	padded := e.area[:int(h.headerBlocks())*block.Size]
	clear(padded[len(e.area):])
	return padded
}

// reader takes values off the front of a record; after a value that is not
// there all further ones are zero and bad is set.
type reader struct {
	p   []byte
	bad bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.p)
	if n <= 0 {
		r.bad, r.p = true, nil
		return 0
	}
	r.p = r.p[n:]
	return v
}

func (r *reader) bytes(n uint64) []byte {
	if n > uint64(len(r.p)) {
		r.bad, r.p = true, nil
		return nil
	}
	b := r.p[:n]
	r.p = r.p[n:]
	return b
}

func (r *reader) byte() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.bytes(4); b != nil {
		return le.Uint32(b)
	}
	return 0
}

// count reads how many items of at least size bytes follow.
func (r *reader) count(size int) int {
	n := r.uvarint()
	if n > uint64(len(r.p)/size) {
		r.bad, r.p = true, nil
		return 0
	}
	return int(n)
}

// decodeRecords reads the records of a whole header area. Data and CRCs of the
// result may be parts of area. ok is false when it makes no sense.
func decodeRecords(h *header, area []byte) (b batch, ok bool) {
	b.header, b.area = *h, area[:h.headerBytes]
	r := &reader{p: area[fixedBytes:h.headerBytes]}
	at := h.block + h.headerBlocks()
	for range h.records {
		switch r.byte() {
		case recSection:
			at = decodeSection(r, &b, at)
		case recMove:
			at = decodeMove(r, &b, at)
		case recSegments:
			for range r.count(2) {
				id, g := r.uvarint(), r.uvarint()
				r.bad = r.bad || id == 0 || id > 1<<32-1
				b.claimed = append(b.claimed, segmentUse{SegmentID(id), g})
			}
		case recVoids:
			for range r.count(3) {
				from, n, id := r.uvarint(), r.uvarint(), r.uvarint()
				r.bad = r.bad || from+n < from || id > 1<<32-1
				b.voids = append(b.voids, void{from, from + n, SegmentID(id)})
			}
		default:
			r.bad = true
		}
		if r.bad || at > h.next() {
			return b, false
		}
	}
	return b, len(r.p) == 0 && at == h.next()
}

func decodeSection(r *reader, b *batch, at uint32) uint32 {
	s := section{flags: r.byte()}
	s.key = ReplicaKey{block.GroupID(r.uvarint()), block.ReplicaID(r.uvarint())}
	s.hard = HardState{r.uvarint(), r.uvarint(), r.uvarint()}
	s.trunc = EntryID{r.uvarint(), r.uvarint()}
	s.last, s.prev = r.uvarint(), r.uvarint()
	n := r.count(7)
	if n > 0 {
		s.first = r.uvarint()
		s.entries = make([]entryRecord, 0, n)
		if s.first == 0 || s.first <= s.trunc.Index || s.last-s.first != uint64(n-1) {
			r.bad = true
		}
	}
	if s.last < s.trunc.Index || s.last > block.MaxRaftIndex {
		r.bad = true
	}
	for range n {
		e := entryRecord{crc: r.uint32(), term: r.uvarint()}
		dataLen, payloadBytes := r.uvarint(), r.uvarint()
		if payloadBytes > block.MaxEntryBytes || dataLen > MaxDataBytes {
			r.bad = true
		}
		e.data = r.bytes(dataLen)
		if r.bad {
			return at
		}
		e.payloadBytes, e.payload = uint32(payloadBytes), at
		at += blocksOf(int(payloadBytes))
		s.entries = append(s.entries, e)
	}
	b.sections = append(b.sections, s)
	return at
}

func decodeMove(r *reader, b *batch, at uint32) uint32 {
	var m moveRecord
	m.Key = ReplicaKey{block.GroupID(r.uvarint()), block.ReplicaID(r.uvarint())}
	copy(m.Volume[:], r.bytes(16))
	chunk, first, n := r.uvarint(), r.uvarint(), r.uvarint()
	generation := r.uvarint()
	m.Written = block.Version(r.uvarint())
	crcs := r.bytes(4 * min(n, block.MaxExtentBlocks+1))
	if r.bad || n == 0 || n > block.MaxExtentBlocks || chunk > 1<<32-1 || generation > 1<<32-1 || first+n > block.BlocksPerChunk {
		r.bad = true
		return at
	}
	m.Chunk, m.Block, m.Generation = block.Chunk(chunk), block.Index(first), block.Generation(generation)
	m.CRCs = make([]uint32, n)
	for i := range m.CRCs {
		m.CRCs[i] = le.Uint32(crcs[4*i:])
	}
	m.payload = at
	b.moves = append(b.moves, m)
	return at + uint32(n)
}
