package node

import (
	"encoding/binary"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
)

// Watermarks of a disk, in percent of its room (S7). Fill is live data and what
// the logs claim.
const (
	// collectPercent: collection goes before everything else; a person is told.
	collectPercent = 75
	// slowPercent: writers are slowed from here on, up to maxDelay at refusePercent.
	slowPercent = 85
	// refusePercent: new writes wait; reads, trims and recovery go on. Most of
	// what fills a disk that is written fast is log that the next checkpoints let
	// go of, so only a disk that stays full for refuseAfter refuses.
	refusePercent = 90
	refuseAfter   = 5 * time.Second
	// maxDelay is how long a write waits just below refusePercent.
	maxDelay = 50 * time.Millisecond
	// maxDelayedBytes bounds the payloads that wait so; further writes are busy.
	maxDelayedBytes = 64 << 20
	// spaceInterval is how often nodes tell each other how full their disks are.
	spaceInterval = 500 * time.Millisecond
	// spaceStale is when a report is too old to refuse writes for: its node is
	// away and takes none. What it will have to take when it is back counts then.
	spaceStale = 3 * time.Second
	// maxSpaceDisks bounds the disks of one message.
	maxSpaceDisks = 256
)

// diskSpace is what one disk reported last.
type diskSpace struct {
	disk        block.DiskID
	size, taken int64 // bytes
	at          clock.Instant
}

// space decides about room before a proposal is made (S7): from what the disks
// of all replicas reported, less what is in flight. Apply never does.
//
// A disk that has not reported, or not lately, counts as empty: the admission of a write is no
// promise that needs it, because an accepted entry is refused by no follower, and
// a full follower reports within spaceInterval.
type space struct {
	node  *Node
	known map[block.DiskID]diskSpace
	// inflight is the bytes of proposals that have not ended, since those of
	// such that ended after the disk reported last.
	inflight, since map[block.DiskID]int64
	delayed         int64 // bytes of proposals that wait for their time
	// fullFrom is when a disk first reported to be full, of those that have
	// done so ever since.
	fullFrom map[block.DiskID]clock.Instant
}

func newSpace(n *Node) *space {
	return &space{node: n, known: make(map[block.DiskID]diskSpace), inflight: make(map[block.DiskID]int64), since: make(map[block.DiskID]int64), fullFrom: make(map[block.DiskID]clock.Instant)}
}

// tick refreshes the own disks and tells the other nodes.
func (s *space) tick() {
	n := s.node
	if n.stopping {
		return
	}
	n.loop.After(spaceInterval, s.tick)
	var own []diskSpace
	for _, d := range n.disks {
		if d.failed == nil {
			ds := diskSpace{disk: d.id, size: d.room(), taken: d.taken()}
			s.reported(ds)
			own = append(own, ds)
		}
	}
	if len(own) == 0 {
		return
	}
	for _, id := range sortedKeys(n.peers.addrs) {
		if p := n.peers.Peer(id); p != nil {
			p.Send(transport.Control, transport.Message{Type: transport.TypeSpace, Header: appendSpace(nil, own)})
		}
	}
}

func (s *space) receive(header []byte) {
	disks, err := decodeSpace(header)
	if err != nil {
		s.node.counters.BadMessages++
		return
	}
	for _, d := range disks {
		if s.node.diskOf(d.disk) == nil {
			s.reported(d)
		}
	}
}

func (s *space) reported(d diskSpace) {
	d.at = s.node.loop.Now()
	s.known[d.disk] = d
	delete(s.since, d.disk)
	if d.taken*100 < d.size*refusePercent {
		delete(s.fullFrom, d.disk)
	} else if _, ok := s.fullFrom[d.disk]; !ok {
		s.fullFrom[d.disk] = s.node.loop.Now()
	}
}

// fillOf is how full a disk is, in percent of its room, counting what is in flight.
func (s *space) fillOf(d block.DiskID) float64 {
	k, ok := s.known[d]
	switch {
	case !ok || s.node.loop.Now().Sub(k.at) >= spaceStale:
		return 0
	case k.size <= 0:
		return 100
	}
	return 100 * float64(k.taken+s.inflight[d]+s.since[d]) / float64(k.size)
}

// fill is that of the fullest disk of rep's group.
func (s *space) fill(rep *replica) float64 {
	worst := 0.0
	for _, d := range s.node.orders.disksOf(rep) {
		worst = max(worst, s.fillOf(d))
	}
	return worst
}

// refusal is what a new write of rep's group is answered for want of room:
// StatusBusy while that may pass by itself, StatusNoSpace when a disk has been
// full for refuseAfter, 0 when there is room.
func (s *space) refusal(rep *replica) wire.Status {
	var st wire.Status
	for _, d := range s.node.orders.disksOf(rep) {
		if s.fillOf(d) < refusePercent {
			continue
		}
		if from, ok := s.fullFrom[d]; ok && s.node.loop.Now().Sub(from) >= refuseAfter {
			return wire.StatusNoSpace
		}
		st = wire.StatusBusy
	}
	return st
}

// delay is how long a write waits before it is proposed.
func (s *space) delay(rep *replica) time.Duration {
	over := s.fill(rep) - slowPercent
	if over <= 0 {
		return 0
	}
	return time.Duration(min(1, over/(refusePercent-slowPercent)) * float64(maxDelay))
}

// began counts a write of rep's group as in flight on the disks it returns,
// until ended.
func (s *space) began(rep *replica, bytes int) []block.DiskID {
	disks := s.node.orders.disksOf(rep)
	for _, d := range disks {
		s.inflight[d] += int64(bytes)
	}
	return disks
}

func (s *space) ended(disks []block.DiskID, bytes int) {
	for _, d := range disks {
		s.inflight[d] -= int64(bytes)
		s.since[d] += int64(bytes)
	}
}

// The header of TypeSpace: version, number of disks (16 bits), then per disk
// id, size and taken bytes. Little-endian.
const (
	spaceVersion = 1
	spaceHead    = 3
	spaceDisk    = 16 + 8 + 8
)

func appendSpace(dst []byte, disks []diskSpace) []byte {
	disks = disks[:min(len(disks), maxSpaceDisks)]
	dst = append(dst, spaceVersion)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(disks)))
	for _, d := range disks {
		dst = append(dst, d.disk[:]...)
		dst = binary.LittleEndian.AppendUint64(dst, uint64(d.size))
		dst = binary.LittleEndian.AppendUint64(dst, uint64(d.taken))
	}
	return dst
}

func decodeSpace(p []byte) ([]diskSpace, error) {
	if len(p) < spaceHead || p[0] != spaceVersion {
		return nil, block.Errorf(block.Unsupported, "space report of an unknown version")
	}
	count := int(binary.LittleEndian.Uint16(p[1:]))
	p = p[spaceHead:]
	if count > maxSpaceDisks || len(p) != count*spaceDisk {
		return nil, block.Errorf(block.Invalid, "space report of %d disks in %d bytes", count, len(p))
	}
	disks := make([]diskSpace, count)
	for i := range disks {
		d := &disks[i]
		copy(d.disk[:], p)
		d.size = int64(binary.LittleEndian.Uint64(p[16:]))
		d.taken = int64(binary.LittleEndian.Uint64(p[24:]))
		if d.size < 0 || d.taken < 0 {
			return nil, block.Errorf(block.Invalid, "space report of a disk of %d bytes, %d of them taken", d.size, d.taken)
		}
		p = p[spaceDisk:]
	}
	return disks, nil
}
