package wire

import (
	"firn.io/firn/internal/block"
)

// Limits of a health report.
const (
	MaxHealthDisks    = 256
	MaxHealthCopies   = 256
	MaxHealthReplicas = 8192
	MaxHealthVolumes  = 2048
	MaxHealthBytes    = 512 << 10
	// 1: without retired replicas and copies; 2: without what is served and used.
	healthVersion = 3
)

// DiskState says what a disk does with new writes. Values travel; they rise
// with what is wrong.
type DiskState uint8

const (
	// DiskOK takes all.
	DiskOK DiskState = 1
	// DiskFilling collects garbage ahead of everything else.
	DiskFilling DiskState = 2
	// DiskSlow delays writes.
	DiskSlow DiskState = 3
	// DiskFull refuses writes; reads, trims and recovery go on.
	DiskFull DiskState = 4
	// DiskFailed takes part in nothing any more (L8).
	DiskFailed DiskState = 5
)

var diskStates = [...]string{"unknown", "ok", "filling", "slow", "full", "failed"}

func (s DiskState) String() string {
	if int(s) < len(diskStates) {
		return diskStates[s]
	}
	return diskStates[0]
}

// DiskHealth is how one disk of a node is. Sizes are bytes.
type DiskHealth struct {
	Disk  block.DiskID
	State DiskState
	// RoomBytes is what live data and logs may fill, TakenBytes what they do (S7);
	// the watermarks count from these. LogBytes are claimed by logs.
	RoomBytes, TakenBytes, LiveBytes, LogBytes int64
	// Corrupt counts reads and moves of blocks that failed their checksums, since
	// the node was started.
	Corrupt uint64
	Reason  string // for people: why the disk is not OK; at most 1 KiB
}

// Percent is how full the disk is.
func (d *DiskHealth) Percent() float64 {
	if d.RoomBytes <= 0 {
		return 0
	}
	return 100 * float64(d.TakenBytes) / float64(d.RoomBytes)
}

// CopyHealth is how far a replica is that is filled from another one's state.
type CopyHealth struct {
	Group   block.GroupID
	Replica block.ReplicaID
	// From is the node that it is taken from; 0 while it waits for its turn.
	From block.NodeID
	// Done of Total chunks are as they should be; Total is 0 until it is known.
	Done, Total uint32
	// Bytes of data have come, of about TotalBytes.
	Bytes, TotalBytes int64
	// LeftSeconds is about the time that is left; 0: not known.
	LeftSeconds uint32
}

// ServedReplica is a replica that votes in its group.
type ServedReplica struct {
	Group   block.GroupID
	Replica block.ReplicaID
	// Follows says that it knows the group's leader, or is it: then also Leads.
	Follows, Leads bool
}

const (
	servedFollows = 1 << iota
	servedLeads
	knownServed = servedFollows | servedLeads
)

// VolumeUsage is how many bytes of a volume the groups hold that the node leads.
type VolumeUsage struct {
	Volume block.VolumeID
	Bytes  int64
}

// NodeHealth is a node's answer to ReqHealth.
type NodeHealth struct {
	Disks []DiskHealth
	// Replicas on the node's disks; Halted of them take no part, why the first
	// of them does not.
	Replicas, Halted uint32
	HaltedReason     string
	// Retired replicas were replaced, and their data is still to be removed.
	Retired uint32
	// Copies are those that are filled, and wait for it.
	Copies []CopyHealth
	// Given is how many replicas the metadata store gives the node, as far as the
	// node knows, and Missing how many of them are not on its disks.
	Given, Missing uint32
	// Served are those that take part in their groups.
	Served []ServedReplica
	// Used is by volume.
	Used []VolumeUsage
}

// AppendHealth appends the encoded report to dst: at most MaxHealthDisks disks,
// MaxHealthCopies copies, MaxHealthReplicas served ones and MaxHealthVolumes usages.
func AppendHealth(dst []byte, h *NodeHealth) []byte {
	disks := h.Disks[:min(len(h.Disks), MaxHealthDisks)]
	dst = append(dst, healthVersion)
	dst = appendU32(dst, h.Replicas)
	dst = appendU32(dst, h.Halted)
	dst = appendText(dst, h.HaltedReason)
	dst = appendU16(dst, uint16(len(disks)))
	for i := range disks {
		d := &disks[i]
		dst = append(dst, d.Disk[:]...)
		dst = append(dst, byte(d.State))
		for _, n := range [...]int64{d.RoomBytes, d.TakenBytes, d.LiveBytes, d.LogBytes} {
			dst = appendU64(dst, uint64(n))
		}
		dst = appendU64(dst, d.Corrupt)
		dst = appendText(dst, d.Reason)
	}
	copies := h.Copies[:min(len(h.Copies), MaxHealthCopies)]
	dst = appendU32(dst, h.Retired)
	dst = appendU16(dst, uint16(len(copies)))
	for i := range copies {
		c := &copies[i]
		for _, n := range [...]uint64{uint64(c.Group), uint64(c.Replica), uint64(c.Bytes), uint64(c.TotalBytes)} {
			dst = appendU64(dst, n)
		}
		for _, n := range [...]uint32{uint32(c.From), c.Done, c.Total, c.LeftSeconds} {
			dst = appendU32(dst, n)
		}
	}
	dst = appendU32(dst, h.Given)
	dst = appendU32(dst, h.Missing)
	served := h.Served[:min(len(h.Served), MaxHealthReplicas)]
	dst = appendU16(dst, uint16(len(served)))
	for _, s := range served {
		dst = appendU64(dst, uint64(s.Group))
		dst = appendU64(dst, uint64(s.Replica))
		flags := byte(0)
		if s.Follows {
			flags |= servedFollows
		}
		if s.Leads {
			flags |= servedLeads
		}
		dst = append(dst, flags)
	}
	used := h.Used[:min(len(h.Used), MaxHealthVolumes)]
	dst = appendU16(dst, uint16(len(used)))
	for i := range used {
		dst = append(dst, used[i].Volume[:]...)
		dst = appendU64(dst, uint64(used[i].Bytes))
	}
	return dst
}

func appendText(dst []byte, s string) []byte {
	s = s[:min(len(s), maxTextBytes)]
	return append(appendU16(dst, uint16(len(s))), s...)
}

// DecodeHealth decodes a report; it keeps nothing of data. Kinds Invalid and
// Unsupported.
func DecodeHealth(data []byte) (h NodeHealth, err error) {
	r := reader{p: data}
	if v := r.u8(); v != healthVersion {
		return h, block.Errorf(block.Unsupported, "health report of version %d", v)
	}
	h.Replicas, h.Halted = r.u32(), r.u32()
	h.HaltedReason = r.text()
	n := int(r.u16())
	if n > MaxHealthDisks {
		return h, block.Errorf(block.Invalid, "health report of %d disks", n)
	}
	for range n {
		d := DiskHealth{Disk: block.DiskID(r.uuid()), State: DiskState(r.u8())}
		for _, to := range [...]*int64{&d.RoomBytes, &d.TakenBytes, &d.LiveBytes, &d.LogBytes} {
			if *to = int64(r.u64()); *to < 0 {
				return h, block.Errorf(block.Invalid, "health report of a disk with %d bytes", *to)
			}
		}
		d.Corrupt = r.u64()
		d.Reason = r.text()
		if r.short {
			break
		}
		h.Disks = append(h.Disks, d)
	}
	h.Retired = r.u32()
	if n = int(r.u16()); n > MaxHealthCopies {
		return h, block.Errorf(block.Invalid, "health report of %d copies", n)
	}
	for range n {
		c := CopyHealth{Group: block.GroupID(r.u64()), Replica: block.ReplicaID(r.u64()), Bytes: int64(r.u64()), TotalBytes: int64(r.u64())}
		c.From, c.Done, c.Total, c.LeftSeconds = block.NodeID(r.u32()), r.u32(), r.u32(), r.u32()
		if c.Bytes < 0 || c.TotalBytes < 0 {
			return h, block.Errorf(block.Invalid, "health report of a copy of %d bytes", c.TotalBytes)
		}
		if r.short {
			break
		}
		h.Copies = append(h.Copies, c)
	}
	h.Given, h.Missing = r.u32(), r.u32()
	if err := r.served(&h); err != nil {
		return h, err
	}
	return h, r.end("health report")
}

// served reads what is served and used.
func (r *reader) served(h *NodeHealth) error {
	n := int(r.u16())
	if n > MaxHealthReplicas {
		return block.Errorf(block.Invalid, "health report of %d replicas", n)
	}
	for range n {
		s := ServedReplica{Group: block.GroupID(r.u64()), Replica: block.ReplicaID(r.u64())}
		flags := r.u8()
		if flags&^knownServed != 0 {
			return block.Errorf(block.Invalid, "health report of a replica with flags %#x", flags)
		}
		s.Follows, s.Leads = flags&servedFollows != 0, flags&servedLeads != 0
		if r.short {
			return nil
		}
		h.Served = append(h.Served, s)
	}
	if n = int(r.u16()); n > MaxHealthVolumes {
		return block.Errorf(block.Invalid, "health report of %d volumes", n)
	}
	for range n {
		u := VolumeUsage{Volume: block.VolumeID(r.uuid()), Bytes: int64(r.u64())}
		if u.Bytes < 0 {
			return block.Errorf(block.Invalid, "health report of a volume with %d bytes", u.Bytes)
		}
		if r.short {
			return nil
		}
		h.Used = append(h.Used, u)
	}
	return nil
}

// text reads a text of at most maxTextBytes.
func (r *reader) text() string {
	n := int(r.u16())
	if n > maxTextBytes {
		r.short = true
		return ""
	}
	return string(r.take(n))
}
