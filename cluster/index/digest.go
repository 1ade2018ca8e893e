package index

import (
	"bytes"
	"encoding/binary"
	"hash"
	"hash/fnv"
	"slices"

	"firn.io/firn/internal/block"
)

// Digest is a checksum of what can be seen: the group's record, all volume
// records with their windows, and for each block the data that the newest or a
// retained view sees (generation, written, CRC). Equal applied indexes have
// equal digests on all replicas, whenever they made their checkpoints. It reads
// the store and blocks.
func (r *Replica) Digest() (digest uint64, err error) {
	h := fnv.New64a()
	h.Write(appendGroup(nil, &r.group))
	m := &merger{snap: r.db.acquire(), local: r.local}
	defer func() {
		if cerr := r.db.release(m.snap); err == nil {
			err = cerr
		}
	}()
	if err := m.open(); err != nil {
		return 0, err
	}
	defer func() {
		if cerr := m.it.Close(); err == nil {
			err = cerr
		}
	}()
	all := slices.Clone(r.order)
	slices.SortFunc(all, func(a, b *volume) int { return bytes.Compare(a.record.Volume[:], b.record.Volume[:]) })
	for _, v := range all {
		h.Write(v.record.Volume[:])
		h.Write(appendVolume(nil, v, 0))
		h.Write(v.record.VolumeValue)
		if v.record.Tombstone {
			continue
		}
		m.valid = false
		if err := m.digestVolume(h, v); err != nil {
			return 0, err
		}
	}
	return h.Sum64(), nil
}

func (m *merger) digestVolume(h hash.Hash64, v *volume) error {
	for c, ok := v.chunks.next(0); ok; c, ok = v.chunks.next(c + 1) {
		for base := uint16(0); base < block.BlocksPerChunk; base += cellBlocks {
			if err := m.digestCell(h, v, c, base); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *merger) digestCell(h hash.Hash64, v *volume, c block.Chunk, base uint16) error {
	if err := m.readCell(v.number, c, base); err != nil {
		return err
	}
	m.cell.reset()
	m.cell.addMarkers(v.markers, c)
	layers := [2]*chunkDelta{}
	for i, d := range []*volumeDelta{v.delta, v.frozen} {
		if d == nil || d.chunks[c] == nil {
			continue
		}
		layers[i] = d.chunks[c]
		extents := layers[i].cell(base)
		first := layers[i].search(base)
		for j := range extents {
			m.cell.addExtent(&extents[j], layer(i), base, first+j)
		}
	}
	for j := range m.found {
		e := &m.found[j]
		m.cell.add(candidate{gen: e.key.gen, written: e.key.written, layer: layerStore, from: uint8(e.key.block - base), count: e.count, src: j})
	}
	keep := v.retention()
	m.cell.resolve(&keep)
	for b := uint8(0); b < cellBlocks; b++ {
		for i := range m.cell.cands {
			k := &m.cell.cands[i]
			if k.live&(1<<b) == 0 {
				continue
			}
			var crc uint32
			switch k.layer {
			case layerMarker:
				continue
			case layerStore:
				e := &m.found[k.src]
				if e.place.Kind == KindZero {
					continue
				}
				crc = e.crcs[b-k.from]
			default:
				e := &layers[k.layer].extents[k.src]
				if e.zero() {
					continue
				}
				crc = layers[k.layer].crcAt(e, uint16(b-k.from))
			}
			var p [26]byte
			binary.LittleEndian.PutUint32(p[0:], uint32(c))
			binary.LittleEndian.PutUint16(p[4:], base+uint16(b))
			binary.LittleEndian.PutUint32(p[6:], uint32(k.gen))
			binary.LittleEndian.PutUint64(p[10:], uint64(k.written))
			binary.LittleEndian.PutUint32(p[18:], crc)
			h.Write(p[:])
		}
	}
	return nil
}
