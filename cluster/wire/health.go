package wire

import (
	"firn.io/firn/internal/block"
)

// Limits of a health report.
const (
	MaxHealthDisks = 256
	MaxHealthBytes = 512 << 10
	healthVersion  = 1
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

// NodeHealth is a node's answer to ReqHealth.
type NodeHealth struct {
	Disks []DiskHealth
	// Replicas on the node's disks; Halted of them take no part, why the first
	// of them does not.
	Replicas, Halted uint32
	HaltedReason     string
}

// AppendHealth appends the encoded report to dst: at most MaxHealthDisks disks.
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
	return h, r.end("health report")
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
