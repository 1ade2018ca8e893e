package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// volumeBytes is the size of the volume that every server serves.
const volumeBytes = 1 << 30

type job struct {
	name       string
	rw         string
	blockBytes int
	depth      int
}

var jobs = []job{
	{"4 KiB random read, 1", "randread", 4096, 1},
	{"4 KiB random read, 32", "randread", 4096, 32},
	{"4 KiB random write, 1", "randwrite", 4096, 1},
	{"4 KiB random write, 32", "randwrite", 4096, 32},
	{"1 MiB read, 4", "read", 1 << 20, 4},
	{"1 MiB write, 4", "write", 1 << 20, 4},
}

func (j job) writes() bool { return j.rw == "write" || j.rw == "randwrite" }

type fioResult struct {
	ops         int64
	bytes       int64
	iops        float64
	bytesPerSec float64
	median, p99 time.Duration
	clientCPU   time.Duration
}

// fioSide is the part of fio's JSON for one direction.
type fioSide struct {
	IOBytes  int64   `json:"io_bytes"`
	TotalIOs int64   `json:"total_ios"`
	IOPS     float64 `json:"iops"`
	BWBytes  float64 `json:"bw_bytes"`
	Clat     struct {
		Percentile map[string]int64 `json:"percentile"`
	} `json:"clat_ns"`
}

// runFio runs one job for the given time, or once over the volume if it is 0.
func runFio(ctx context.Context, uri string, j job, each time.Duration) (fioResult, error) {
	args := []string{"--name=bench", "--ioengine=nbd", "--uri=" + uri, "--rw=" + j.rw,
		"--bs=" + strconv.Itoa(j.blockBytes), "--iodepth=" + strconv.Itoa(j.depth),
		"--size=" + strconv.Itoa(volumeBytes), "--randrepeat=1", "--norandommap", "--refill_buffers",
		"--output-format=json"}
	if each > 0 {
		args = append(args, "--time_based", "--runtime="+strconv.Itoa(int(each.Seconds())))
	}
	cmd := exec.CommandContext(ctx, "fio", args...)
	out, err := cmd.Output()
	if err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			return fioResult{}, fmt.Errorf("fio: %w: %s%s", err, out, e.Stderr)
		}
		return fioResult{}, fmt.Errorf("fio: %w", err)
	}
	// Engines print notes on the same stream, before the JSON.
	out = out[max(0, bytes.IndexByte(out, '{')):]
	var parsed struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write fioSide
			UsrCPU      float64 `json:"usr_cpu"`
			SysCPU      float64 `json:"sys_cpu"`
			RuntimeMS   int64   `json:"job_runtime"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &parsed); err != nil || len(parsed.Jobs) != 1 {
		return fioResult{}, fmt.Errorf("fio's answer cannot be read: %v", err)
	}
	f := parsed.Jobs[0]
	if f.Error != 0 {
		return fioResult{}, fmt.Errorf("fio ended with error %d", f.Error)
	}
	side := f.Read
	if j.writes() {
		side = f.Write
	}
	return fioResult{ops: side.TotalIOs, bytes: side.IOBytes, iops: side.IOPS, bytesPerSec: side.BWBytes,
		median:    time.Duration(side.Clat.Percentile["50.000000"]),
		p99:       time.Duration(side.Clat.Percentile["99.000000"]),
		clientCPU: time.Duration((f.UsrCPU + f.SysCPU) / 100 * float64(f.RuntimeMS) * float64(time.Millisecond))}, nil
}
