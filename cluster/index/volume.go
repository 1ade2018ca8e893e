package index

import (
	"encoding/binary"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

func segmentID(n uint64) seglog.SegmentID { return seglog.SegmentID(n) }

func appendUint64(dst []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(dst, v) }
func appendUint32(dst []byte, v uint32) []byte { return binary.LittleEndian.AppendUint32(dst, v) }

func takeUint64(p *[]byte) uint64 {
	v := binary.LittleEndian.Uint64(*p)
	*p = (*p)[8:]
	return v
}

func takeUint32(p *[]byte) uint32 {
	v := binary.LittleEndian.Uint32(*p)
	*p = (*p)[4:]
	return v
}

// retention says which older generations still have views. The groups learn of
// a snapshot by the first write of a higher generation, so everything counts
// as retained until the list says otherwise.
type retention struct {
	// from: all generations from here up to the current one are retained.
	from block.Generation
	// list are the retained ones below from, ascending.
	list []block.Generation
}

// needs tells whether a view sees what was written in generation a although
// generation b (>= a) wrote over it: whether one in [a, b) is retained.
func (r *retention) needs(a, b block.Generation) bool {
	if a >= b {
		return false
	}
	if r.from < b {
		return true
	}
	for _, g := range r.list {
		if g >= a && g < b {
			return true
		}
	}
	return false
}

// volume is a group's state of one volume.
//
// The record, the window, retention and markers are replicated. So is the chunk
// table but for what the local reaper does to it: it removes chunks that became
// empty and raises others to a marker, both covered by the floor version, so
// that the version of a chunk never falls (S4).
type volume struct {
	number uint32
	record wire.VolumeRecord
	// The pair that the installed epoch replaced: a repeated Fence answers it again.
	replacedEpoch block.Epoch
	replacedNonce block.Nonce
	window        window
	retained      retention

	floorVersion block.Version
	chunks       chunkTable
	markers      *markers // shared with a job once frozen: copied before a change
	sharing      bool     // markers is shared
	saved        *markers // as the last merged checkpoint has them; never changed

	dirty      bool // the record differs from that of the last freeze
	valueDirty bool // so does its VolumeValue

	delta, frozen *volumeDelta // nil when empty
	storeBlocks   int64        // live local blocks that the store holds
	reapCursor    reapCursor
}

// retention of what is stored: a tombstone has no views.
func (v *volume) retention() retention {
	if v.record.Tombstone {
		return retention{from: block.GenerationLatest}
	}
	return v.retained
}

// version is S4's.
func (v *volume) version(c block.Chunk) block.Version {
	at, ok := v.chunks.get(c)
	if !ok {
		at = v.floorVersion
	}
	if _, written, ok := v.markers.newest(c, block.GenerationLatest); ok {
		at = max(at, written)
	}
	return at
}

const (
	volumeTombstone = 1 << 0
	volumeReadOnly  = 1 << 1
	volumeKnown     = volumeTombstone | volumeReadOnly
	volumeFixed     = 1 + 2 + 4 + 4*8 + 4 + 8 + 8 + 8 + 4 + 2
)

// appendVolume encodes the volume's record without its VolumeValue. The floor
// version is given, for a digest leaves it out: it is local.
func appendVolume(dst []byte, v *volume, floor block.Version) []byte {
	var flags uint16
	if v.record.Tombstone {
		flags |= volumeTombstone
	}
	if v.record.ReadOnly {
		flags |= volumeReadOnly
	}
	dst = append(dst, recordVersion, byte(flags), byte(flags>>8))
	dst = appendUint32(dst, v.number)
	dst = appendUint64(dst, uint64(v.record.Epoch))
	dst = appendUint64(dst, uint64(v.record.Nonce))
	dst = appendUint64(dst, uint64(v.replacedEpoch))
	dst = appendUint64(dst, uint64(v.replacedNonce))
	dst = appendUint32(dst, uint32(v.record.Generation))
	dst = appendUint64(dst, uint64(v.record.Size))
	dst = appendUint64(dst, uint64(v.record.Settings))
	dst = appendUint64(dst, uint64(floor))
	dst = appendUint32(dst, uint32(v.retained.from))
	dst = append(dst, byte(len(v.retained.list)), byte(len(v.retained.list)>>8))
	for _, g := range v.retained.list {
		dst = appendUint32(dst, uint32(g))
	}
	return v.window.append(dst)
}

func decodeVolume(id block.VolumeID, p []byte) (*volume, error) {
	whole := p
	if len(p) < volumeFixed {
		return nil, corrupt("volume record", whole)
	}
	flags := binary.LittleEndian.Uint16(p[1:])
	if p[0] != recordVersion || flags&^volumeKnown != 0 {
		return nil, block.Errorf(block.Unsupported, "index: volume record of version %d, flags %#x", p[0], flags)
	}
	p = p[3:]
	v := &volume{number: takeUint32(&p), markers: &markers{}}
	v.saved, v.sharing = v.markers, true
	v.record = wire.VolumeRecord{
		Volume:    id,
		Epoch:     block.Epoch(takeUint64(&p)),
		Nonce:     block.Nonce(takeUint64(&p)),
		Tombstone: flags&volumeTombstone != 0,
		ReadOnly:  flags&volumeReadOnly != 0,
	}
	v.replacedEpoch = block.Epoch(takeUint64(&p))
	v.replacedNonce = block.Nonce(takeUint64(&p))
	v.record.Generation = block.Generation(takeUint32(&p))
	v.record.Size = int64(takeUint64(&p))
	v.record.Settings = block.SettingsCounter(takeUint64(&p))
	v.floorVersion = block.Version(takeUint64(&p))
	v.retained.from = block.Generation(takeUint32(&p))
	n := int(p[0]) | int(p[1])<<8
	p = p[2:]
	if len(p) < 4*n {
		return nil, corrupt("volume record", whole)
	}
	for i := range n {
		g := block.Generation(takeUint32(&p))
		if i > 0 && g <= v.retained.list[i-1] {
			return nil, corrupt("volume record", whole)
		}
		v.retained.list = append(v.retained.list, g)
	}
	var ok bool
	if v.window, p, ok = decodeWindow(p); !ok || len(p) != 0 || v.record.Size < 0 {
		return nil, corrupt("volume record", whole)
	}
	return v, nil
}
