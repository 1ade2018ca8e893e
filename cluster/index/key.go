package index

import (
	"encoding/binary"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// Keys begin with the local id of a replica, a number of this disk, and a kind;
// all numbers in keys are big-endian, so that bytes sort like them. Local id 0
// is the disk itself. Extents are the last kind: opening a replica reads all
// others in one pass. Inside a replica volumes go by a number that the group's
// state gives them.
const (
	kindFormat  = 0x01 // of local 0: the format version
	kindCatalog = 0x02 // of local 0: group, replica

	kindGroup  = 0x01
	kindVolume = 0x02 // volume id
	kindValue  = 0x03 // volume id
	kindMarker = 0x04 // volume number, from, to, ^generation
	kindChunk  = 0x05 // volume number, chunk
	kindLive   = 0x06 // segment, its generation
	kindUsage  = 0x07 // volume number
	kindCopy   = 0x08
	kindExtent = 0x10 // volume number, chunk, block, ^generation, ^written
)

type localID uint32

const (
	headLen    = 5
	markerLen  = headLen + 4 + 4 + 4 + 4
	chunkLen   = headLen + 4 + 4
	liveLen    = headLen + 4 + 8
	usageLen   = headLen + 4
	volumeLen  = headLen + 16
	catalogLen = headLen + 8 + 8
	extentLen  = headLen + 4 + 4 + 2 + 4 + 8
)

func appendHead(dst []byte, l localID, kind byte) []byte {
	return append(binary.BigEndian.AppendUint32(dst, uint32(l)), kind)
}

func appendCatalogKey(dst []byte, k seglog.ReplicaKey) []byte {
	dst = appendHead(dst, 0, kindCatalog)
	dst = binary.BigEndian.AppendUint64(dst, uint64(k.Group))
	return binary.BigEndian.AppendUint64(dst, uint64(k.Replica))
}

func decodeCatalogKey(key []byte) (k seglog.ReplicaKey, ok bool) {
	if len(key) != catalogLen || key[4] != kindCatalog {
		return k, false
	}
	k.Group = block.GroupID(binary.BigEndian.Uint64(key[headLen:]))
	k.Replica = block.ReplicaID(binary.BigEndian.Uint64(key[headLen+8:]))
	return k, true
}

func appendVolumeKey(dst []byte, l localID, kind byte, v block.VolumeID) []byte {
	return append(appendHead(dst, l, kind), v[:]...)
}

func decodeVolumeKey(key []byte) (v block.VolumeID, ok bool) {
	if len(key) != volumeLen {
		return v, false
	}
	copy(v[:], key[headLen:])
	return v, true
}

func appendMarkerKey(dst []byte, l localID, volume uint32, g block.Generation, s span) []byte {
	dst = appendHead(dst, l, kindMarker)
	dst = binary.BigEndian.AppendUint32(dst, volume)
	dst = binary.BigEndian.AppendUint32(dst, uint32(s.from))
	dst = binary.BigEndian.AppendUint32(dst, uint32(s.to))
	return binary.BigEndian.AppendUint32(dst, ^uint32(g))
}

func decodeMarkerKey(key []byte) (volume uint32, g block.Generation, s span, ok bool) {
	if len(key) != markerLen {
		return 0, 0, s, false
	}
	volume = binary.BigEndian.Uint32(key[5:])
	s.from = block.Chunk(binary.BigEndian.Uint32(key[9:]))
	s.to = block.Chunk(binary.BigEndian.Uint32(key[13:]))
	g = block.Generation(^binary.BigEndian.Uint32(key[17:]))
	return volume, g, s, s.from < s.to
}

func appendChunkKey(dst []byte, l localID, volume uint32, c block.Chunk) []byte {
	dst = appendHead(dst, l, kindChunk)
	dst = binary.BigEndian.AppendUint32(dst, volume)
	return binary.BigEndian.AppendUint32(dst, uint32(c))
}

func decodeChunkKey(key []byte) (volume uint32, c block.Chunk, ok bool) {
	if len(key) != chunkLen {
		return 0, 0, false
	}
	return binary.BigEndian.Uint32(key[5:]), block.Chunk(binary.BigEndian.Uint32(key[9:])), true
}

func appendLiveKey(dst []byte, l localID, s seglog.SegmentID, generation uint64) []byte {
	dst = appendHead(dst, l, kindLive)
	dst = binary.BigEndian.AppendUint32(dst, uint32(s))
	return binary.BigEndian.AppendUint64(dst, generation)
}

func decodeLiveKey(key []byte) (s seglog.SegmentID, generation uint64, ok bool) {
	if len(key) != liveLen {
		return 0, 0, false
	}
	return seglog.SegmentID(binary.BigEndian.Uint32(key[5:])), binary.BigEndian.Uint64(key[9:]), true
}

func appendUsageKey(dst []byte, l localID, volume uint32) []byte {
	return binary.BigEndian.AppendUint32(appendHead(dst, l, kindUsage), volume)
}

// extentKey names an extent within a replica.
type extentKey struct {
	volume  uint32
	chunk   block.Chunk
	block   uint16
	gen     block.Generation
	written block.Version
}

func appendExtentKey(dst []byte, l localID, k extentKey) []byte {
	dst = appendExtentPrefix(dst, l, k.volume, k.chunk, k.block)
	dst = binary.BigEndian.AppendUint32(dst, ^uint32(k.gen))
	return binary.BigEndian.AppendUint64(dst, ^uint64(k.written))
}

// appendExtentPrefix is before all extents that begin at the block or later,
// and after all that begin earlier.
func appendExtentPrefix(dst []byte, l localID, volume uint32, c block.Chunk, b uint16) []byte {
	dst = appendHead(dst, l, kindExtent)
	dst = binary.BigEndian.AppendUint32(dst, volume)
	dst = binary.BigEndian.AppendUint32(dst, uint32(c))
	return binary.BigEndian.AppendUint16(dst, b)
}

func decodeExtentKey(key []byte) (k extentKey, ok bool) {
	if len(key) != extentLen || key[4] != kindExtent {
		return k, false
	}
	k.volume = binary.BigEndian.Uint32(key[5:])
	k.chunk = block.Chunk(binary.BigEndian.Uint32(key[9:]))
	k.block = binary.BigEndian.Uint16(key[13:])
	k.gen = block.Generation(^binary.BigEndian.Uint32(key[15:]))
	k.written = block.Version(^binary.BigEndian.Uint64(key[19:]))
	return k, k.block < block.BlocksPerChunk
}
