// Package stamp fills a device with self-describing sectors and judges what
// comes back. Each 512 B sector names its volume, its place, its writer and
// the sequence number of its write, under a checksum, so that lost, torn,
// misdirected, invented and resurrected bytes are told apart.
package stamp

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// SectorBytes is the unit of a stamp.
const SectorBytes = 512

const magic = 0x7053_746e_7269_4601

// Seq numbers the writes of one History, from 1. Seq 0 is a sector that reads
// as zero because it was never written.
type Seq uint64

// Stamp is what one sector says of itself. A sector of zeroes has Seq 0.
type Stamp struct {
	Volume [16]byte
	Sector int64 // its number within the volume
	Writer uint32
	Seq    Seq
}

// Sector layout, little-endian:
//
//	0 magic u64 | 8 volume 16 B | 24 sector u64 | 32 writer u32 | 36 zero u32
//	40 seq u64 | 48 filler of 460 B drawn from seq | 508 CRC-32 u32 of 0..507
//
// The checksum is not a CRC32C, the one that Firn guards blocks with: bytes
// followed by their own CRC bring that CRC to one constant, so that all stamped
// blocks would have the same, and no torn block would be found.
var ieee = crc32.IEEETable

// Put writes s over p, which is one sector long.
func (s Stamp) Put(p []byte) {
	_ = p[SectorBytes-1]
	binary.LittleEndian.PutUint64(p, magic)
	copy(p[8:], s.Volume[:])
	binary.LittleEndian.PutUint64(p[24:], uint64(s.Sector))
	binary.LittleEndian.PutUint32(p[32:], s.Writer)
	binary.LittleEndian.PutUint32(p[36:], 0)
	binary.LittleEndian.PutUint64(p[40:], uint64(s.Seq))
	x := uint64(s.Seq)*0x9e3779b97f4a7c15 + uint64(s.Sector)
	for i := 48; i < 504; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint32(p[504:], 0)
	binary.LittleEndian.PutUint32(p[508:], crc32.Checksum(p[:508], ieee))
}

// Parse reads the stamp of a sector. It fails on bytes that no Put made and
// that are not all zero.
func Parse(p []byte) (Stamp, error) {
	_ = p[SectorBytes-1]
	var s Stamp
	if isZero(p[:SectorBytes]) {
		return s, nil
	}
	if got := binary.LittleEndian.Uint64(p); got != magic {
		return s, fmt.Errorf("no stamp: begins with %#x", got)
	}
	if crc32.Checksum(p[:508], ieee) != binary.LittleEndian.Uint32(p[508:]) {
		return s, fmt.Errorf("checksum of the stamp is wrong")
	}
	copy(s.Volume[:], p[8:])
	s.Sector = int64(binary.LittleEndian.Uint64(p[24:]))
	s.Writer = binary.LittleEndian.Uint32(p[32:])
	s.Seq = Seq(binary.LittleEndian.Uint64(p[40:]))
	return s, nil
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
