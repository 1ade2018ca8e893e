package seglog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path"
	"strconv"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// Superblock says what a disk's folder is. It is written once, by Format.
type Superblock struct {
	Cluster block.ClusterID
	Disk    block.DiskID
	Node    block.NodeID
	// SegmentBytes is the size of the segments, a multiple of 4 KiB.
	SegmentBytes int64
	// Created is a date for people.
	Created string
}

const (
	superblockName     = "disk.json"
	logFolder          = "log"
	maxSuperblockBytes = 64 << 10
	minSegmentBytes    = 128 << 10
)

// superblockFile is the superblock as it is stored: one line of JSON, then the
// CRC32C of that line with its line feed, in hexadecimal.
type superblockFile struct {
	Format       int    `json:"format"`
	Cluster      string `json:"cluster"`
	Disk         string `json:"disk"`
	Node         uint32 `json:"node"`
	SegmentBytes int64  `json:"segment_bytes"`
	Created      string `json:"created"`
}

func encodeSuperblock(sb Superblock) ([]byte, error) {
	p, err := json.Marshal(superblockFile{Format: formatVersion, Cluster: sb.Cluster.String(), Disk: sb.Disk.String(),
		Node: uint32(sb.Node), SegmentBytes: sb.SegmentBytes, Created: sb.Created})
	if err != nil {
		return nil, fmt.Errorf("encode a superblock: %w", err)
	}
	p = append(p, '\n')
	return fmt.Appendf(p, "%08x\n", block.CRC(p)), nil
}

func decodeSuperblock(p []byte) (sb Superblock, err error) {
	line, crc, ok := bytes.Cut(p, []byte("\n"))
	want, perr := strconv.ParseUint(string(bytes.TrimSuffix(crc, []byte("\n"))), 16, 32)
	if !ok || perr != nil || block.CRC(p[:len(line)+1]) != uint32(want) {
		return sb, block.Errorf(block.Corrupt, "disk.json fails its checksum: put it back from a copy, or replace the disk, and its replicas are filled from others; nothing on it was changed")
	}
	var f superblockFile
	if err := json.Unmarshal(line, &f); err != nil {
		return sb, block.Wrap(block.Corrupt, err, "the superblock cannot be read")
	}
	if f.Format != formatVersion {
		return sb, block.Errorf(block.Unsupported, "the disk has format %d, this build knows %d: start the build of Firn that wrote it, or a newer one; nothing on it was changed", f.Format, formatVersion)
	}
	cluster, err := block.ParseUUID(f.Cluster)
	if err != nil {
		return sb, block.Wrap(block.Corrupt, err, "the superblock's cluster")
	}
	disk, err := block.ParseUUID(f.Disk)
	if err != nil {
		return sb, block.Wrap(block.Corrupt, err, "the superblock's disk")
	}
	sb = Superblock{Cluster: cluster, Disk: disk, Node: block.NodeID(f.Node), SegmentBytes: f.SegmentBytes, Created: f.Created}
	return sb, checkSegmentBytes(sb.SegmentBytes)
}

func checkSegmentBytes(n int64) error {
	if n < minSegmentBytes || n > MaxSegmentBytes || n%block.Size != 0 {
		return block.Errorf(block.Invalid, "segments of %d bytes: they are multiples of 4 KiB from %d to %d", n, minSegmentBytes, MaxSegmentBytes)
	}
	return nil
}

// Format makes dir a disk's folder, durably. Kind Exists if it is one. The
// caller holds the folder's lock (vfs.Lock) here and as long as a Log is open.
func Format(fs vfs.FS, dir string, sb Superblock) error {
	if err := checkSegmentBytes(sb.SegmentBytes); err != nil {
		return err
	}
	name := path.Join(dir, superblockName)
	if _, err := fs.Stat(name); err == nil {
		return block.Errorf(block.Exists, "%s is a disk's folder already", dir)
	} else if block.KindOf(err) != block.NotFound {
		return err
	}
	if err := fs.MkdirAll(path.Join(dir, logFolder)); err != nil {
		return err
	}
	p, err := encodeSuperblock(sb)
	if err != nil {
		return err
	}
	return vfs.WriteFileAtomic(fs, name, p)
}

// Load reads the superblock of a disk's folder. Kinds NotFound (never
// formatted), Corrupt, Unsupported.
func Load(fs vfs.FS, dir string) (Superblock, error) {
	p, err := vfs.ReadFile(fs, path.Join(dir, superblockName), maxSuperblockBytes)
	if err != nil {
		return Superblock{}, err
	}
	sb, err := decodeSuperblock(p)
	if err != nil {
		return sb, block.Wrap(block.KindOf(err), err, "disk folder %s", dir)
	}
	return sb, nil
}

// failedName is the mark of a failed disk inside its folder; failedBeside is
// the one next to it, for the disk itself may no longer take writes.
const failedName = "failed"

func failedBeside(dir string) string { return path.Clean(dir) + ".failed" }

// MarkFailed records that the disk must not be used again (L8): beside its
// folder, and in it if it can still be written. No restart clears the mark.
func MarkFailed(fs vfs.FS, dir string, sb Superblock, reason string) error {
	text := []byte(sb.Disk.String() + "\n" + reason + "\n")
	err := vfs.WriteFileAtomic(fs, failedBeside(dir), text)
	if inside := vfs.WriteFileAtomic(fs, path.Join(dir, failedName), text); err != nil && inside == nil {
		return nil
	}
	return err
}

// FailedReason tells whether the disk was marked failed. A mark that names
// another disk is ignored: a new disk in the same place starts clean.
func FailedReason(fs vfs.FS, dir string, sb Superblock) (reason string, failed bool, err error) {
	for _, name := range []string{failedBeside(dir), path.Join(dir, failedName)} {
		p, err := vfs.ReadFile(fs, name, maxSuperblockBytes)
		if err != nil {
			if block.KindOf(err) == block.NotFound {
				continue
			}
			return "", false, err
		}
		id, why, _ := bytes.Cut(p, []byte("\n"))
		if string(id) == sb.Disk.String() {
			return string(bytes.TrimSpace(why)), true, nil
		}
	}
	return "", false, nil
}

// rememberedBeside is a note next to a disk's folder that says which disk is there:
// when the folder is gone, that it was one.
func rememberedBeside(dir string) string { return path.Clean(dir) + ".disk" }

// Remember notes beside a disk's folder which disk is in it.
func Remember(fs vfs.FS, dir string, sb Superblock) error {
	if id, ok := Remembered(fs, dir); ok && id == sb.Disk.String() {
		return nil
	}
	return vfs.WriteFileAtomic(fs, rememberedBeside(dir), []byte(sb.Disk.String()+"\n"))
}

// Remembered returns the disk that was in a folder when it was last in use.
func Remembered(fs vfs.FS, dir string) (disk string, ok bool) {
	p, err := vfs.ReadFile(fs, rememberedBeside(dir), maxSuperblockBytes)
	if err != nil {
		return "", false
	}
	id, _, _ := bytes.Cut(p, []byte("\n"))
	_, err = block.ParseUUID(string(id))
	return string(id), err == nil
}
