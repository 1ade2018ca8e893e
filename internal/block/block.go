// Package block is Firn's vocabulary: identifiers, sizes, positions, versions,
// the Device that frontends serve, and the closed set of error kinds. It
// imports only the standard library; everything else imports it.
package block

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
)

// The sizes that the formats are built on. They never change after deployment.
const (
	// Size is the unit of checksum and of the index, in bytes.
	Size = 4096
	// ChunkBytes is the unit of placement, of version, of heat and of tiering.
	ChunkBytes = 4 << 20
	// BlocksPerChunk is how many blocks a chunk holds.
	BlocksPerChunk = ChunkBytes / Size
	// SpanBytes is the part of a volume that shares one list of groups.
	SpanBytes = 1 << 40
	// ChunksPerSpan is how many chunks a span holds.
	ChunksPerSpan = SpanBytes / ChunkBytes
	// MaxEntryBytes bounds the payload of one Raft entry, and so one write.
	MaxEntryBytes = 1 << 20
	// MaxExtentBlocks bounds an extent record of the index (64 KiB).
	MaxExtentBlocks = 16
	// MaxVolumeBytes bounds a volume: what a chunk number of 31 bits reaches.
	MaxVolumeBytes = 8 << 50
)

// ID types. UUIDs are random (version 4); numbers come from counters that
// never go back.
type (
	// ClusterID names a cluster; it is in every segment header and envelope.
	ClusterID [16]byte
	// VolumeID names a volume for its whole life; a name can move, this cannot.
	VolumeID [16]byte
	// DiskID names a disk; a wiped disk gets a new one.
	DiskID [16]byte
	// NodeID names a storage node; chosen by the operator (`--id`), 1..2^31.
	NodeID uint32
	// GroupID names a Raft group.
	GroupID uint64
	// ReplicaID names one replica of a group, unique within its group and never
	// used again. It is the Raft node id.
	ReplicaID uint64
)

// NewUUID returns 16 random bytes marked as a version 4 UUID. Simulated code
// takes its identifiers from its seed instead.
func NewUUID() [16]byte {
	var u [16]byte
	// crypto/rand.Read never fails (it ends the process instead).
	rand.Read(u[:])
	return MarkUUID(u)
}

// MarkUUID sets the version and variant bits of 16 random bytes.
func MarkUUID(u [16]byte) [16]byte {
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// FormatUUID returns the 8-4-4-4-12 form.
func FormatUUID(u [16]byte) string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// ParseUUID reads the 8-4-4-4-12 form.
func ParseUUID(s string) (u [16]byte, err error) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, fmt.Errorf("%q is not a UUID", s)
	}
	if _, err := hex.Decode(u[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return u, fmt.Errorf("%q is not a UUID", s)
	}
	return u, nil
}

func (id ClusterID) String() string { return FormatUUID(id) }
func (id VolumeID) String() string  { return FormatUUID(id) }
func (id DiskID) String() string    { return FormatUUID(id) }

// MarshalText gives the 8-4-4-4-12 form, also as JSON.
func (id ClusterID) MarshalText() ([]byte, error) { return []byte(FormatUUID(id)), nil }

// MarshalText gives the 8-4-4-4-12 form, also as JSON.
func (id VolumeID) MarshalText() ([]byte, error) { return []byte(FormatUUID(id)), nil }

// MarshalText gives the 8-4-4-4-12 form, also as JSON.
func (id DiskID) MarshalText() ([]byte, error) { return []byte(FormatUUID(id)), nil }

// UnmarshalText reads the 8-4-4-4-12 form.
func (id *ClusterID) UnmarshalText(b []byte) error { return unmarshalUUID((*[16]byte)(id), b) }

// UnmarshalText reads the 8-4-4-4-12 form.
func (id *VolumeID) UnmarshalText(b []byte) error { return unmarshalUUID((*[16]byte)(id), b) }

// UnmarshalText reads the 8-4-4-4-12 form.
func (id *DiskID) UnmarshalText(b []byte) error { return unmarshalUUID((*[16]byte)(id), b) }

func unmarshalUUID(id *[16]byte, b []byte) (err error) {
	*id, err = ParseUUID(string(b))
	return err
}

// IsZero tells whether the id was never set.
func (id ClusterID) IsZero() bool { return id == ClusterID{} }

// IsZero tells whether the id was never set.
func (id VolumeID) IsZero() bool { return id == VolumeID{} }

// IsZero tells whether the id was never set.
func (id DiskID) IsZero() bool { return id == DiskID{} }

// Positions inside a volume. They are distinct types so that a chunk number
// cannot be taken for a block number.
type (
	// Chunk is the number of a chunk within its volume.
	Chunk uint32
	// Index is the number of a block within its chunk, 0..1023.
	Index uint16
	// Span is the number of a span within its volume.
	Span uint32
)

// ChunkAt returns the chunk that holds the byte at off (>= 0).
func ChunkAt(off int64) Chunk { return Chunk(off / ChunkBytes) }

// IndexAt returns the block of its chunk that holds the byte at off (>= 0).
func IndexAt(off int64) Index { return Index(off % ChunkBytes / Size) }

// Offset returns the byte offset of block i of chunk c in its volume.
func Offset(c Chunk, i Index) int64 { return int64(c)*ChunkBytes + int64(i)*Size }

// Span returns the span that holds the chunk.
func (c Chunk) Span() Span { return Span(c / ChunksPerSpan) }

// Numbers of the consistency rules.
type (
	// Epoch counts the attachments of a volume (rules F).
	Epoch uint64
	// Nonce tells two attachments apart that a restored etcd gave one epoch.
	Nonce uint64
	// Generation is raised by snapshots; each write carries one.
	Generation uint32
	// OpSeq numbers the entries of one (volume, group, epoch) (W3), from 1.
	OpSeq uint64
	// LayoutVersion counts changes of a volume's spans and of its groups' members.
	LayoutVersion uint64
	// SettingsCounter rises with each change of a volume's size or policy (F2).
	SettingsCounter uint64
	// KeyID names the key that a payload is encrypted with; 0 is none.
	KeyID uint32
)

// GenerationLatest asks a read for the newest generation.
const GenerationLatest Generation = math.MaxUint32

// Version is (era, Raft index): 16 and 48 bits. It orders everything that
// happened to a chunk: written, changed, marker index, floor version, token.
// It never goes backwards; a move to another group, a restore or an unsafe
// recovery raises the era.
type Version uint64

// MaxRaftIndex is the highest Raft index that a Version can carry.
const MaxRaftIndex = 1<<48 - 1

// MakeVersion joins an era and a Raft index. An index over MaxRaftIndex is a
// broken invariant of ours (2^48 entries in one group) and panics.
func MakeVersion(era uint16, index uint64) Version {
	if index > MaxRaftIndex {
		panic("block: Raft index does not fit a version")
	}
	return Version(uint64(era)<<48 | index)
}

// Era returns the upper 16 bits.
func (v Version) Era() uint16 { return uint16(v >> 48) }

// RaftIndex returns the lower 48 bits.
func (v Version) RaftIndex() uint64 { return uint64(v) & MaxRaftIndex }

func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Era(), v.RaftIndex()) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC is the CRC32C of p. Each block's is computed once at the gateway and
// checked wherever its bytes are stored or served.
func CRC(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// UpdateCRC extends a CRC32C by p.
func UpdateCRC(crc uint32, p []byte) uint32 { return crc32.Update(crc, castagnoli, p) }

// FirstBadCRC returns the first block of p whose CRC32C is not the one in crcs,
// or -1. p has a block per checksum; what it lacks counts as bad, and what it has
// beyond them.
func FirstBadCRC(crcs []uint32, p []byte) int {
	for i, want := range crcs {
		if len(p) < Size || CRC(p[:Size]) != want {
			return i
		}
		p = p[Size:]
	}
	if len(p) > 0 {
		return len(crcs)
	}
	return -1
}

// AppendCRCs appends the CRC of each block of p, whose length is a multiple of
// Size, to dst.
func AppendCRCs(dst []uint32, p []byte) []uint32 {
	for ; len(p) >= Size; p = p[Size:] {
		dst = append(dst, CRC(p[:Size]))
	}
	return dst
}

// Kind is the closed set of what can go wrong. Each protocol translates kinds
// in one table: NBD errno, SCSI sense, gRPC status, exit code. The order is
// frozen: kinds travel.
type Kind uint8

const (
	// Internal is a broken invariant of ours, or an error without a kind.
	Internal Kind = iota
	// NotFound names something that does not exist.
	NotFound
	// Exists names something that exists already.
	Exists
	// Invalid is a request that can never succeed as asked.
	Invalid
	// OutOfRange is I/O beyond the end of the volume.
	OutOfRange
	// ReadOnly is a change to a read-only volume.
	ReadOnly
	// NoSpace says the disks are too full for new data; reads and trims go on.
	NoSpace
	// Busy says another owner, client or process holds it.
	Busy
	// Fenced says a newer attachment took the volume; this one is over.
	Fenced
	// Unavailable says no answer can be had now; a later try may succeed.
	Unavailable
	// Corrupt says bytes failed their checksum and no good copy was found.
	Corrupt
	// Canceled says the caller gave up.
	Canceled
	// Unsupported says this build or disk format does not know the request.
	Unsupported
	// Denied says the caller may not do this.
	Denied
	numKinds
)

var kindNames = [numKinds]string{"internal error", "not found", "already exists", "invalid", "out of range", "read only",
	"no space", "busy", "fenced", "unavailable", "corrupt", "canceled", "not supported", "denied"}

func (k Kind) String() string {
	if k < numKinds {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Error makes a Kind a target of errors.Is: errors.Is(err, block.NoSpace).
func (k Kind) Error() string { return k.String() }

// Error is an error of a kind. Text says what was attempted and why it failed,
// and where a person can act, what to do next.
type Error struct {
	Kind  Kind
	Text  string
	Cause error
}

func (e *Error) Error() string {
	if e.Cause == nil {
		return e.Text
	}
	return e.Text + ": " + e.Cause.Error()
}

// Unwrap gives the cause to errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Cause }

// Is matches the error's kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Errorf returns an error of kind k. Use Wrap to keep a cause.
func Errorf(k Kind, format string, args ...any) error {
	return &Error{Kind: k, Text: fmt.Sprintf(format, args...)}
}

// Wrap gives err a kind and a prefix.
func Wrap(k Kind, err error, format string, args ...any) error {
	return &Error{Kind: k, Text: fmt.Sprintf(format, args...), Cause: err}
}

// KindOf returns the kind of the outermost error of a kind in the chain;
// Internal for an error without one. KindOf(nil) panics: success has no kind.
func KindOf(err error) Kind {
	if err == nil {
		panic("block: kind of nil")
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	return Internal
}
